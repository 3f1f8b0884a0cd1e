# SPDX-License-Identifier: MIT
"""The demo: a small language model whose memory comes from the module."""

#: The two sets of weights: early and final.
CHECKPOINTS = ("a", "b")

#: What the model continues unless told otherwise: how the story begins.
PROMPT = "The board lived in a grey box"

#: Tokens (bytes) it generates unless told otherwise.
TOKENS = 128

#: Requests of the trace.
REQUESTS = 32

#: Swaps of the model under texts that are being written.
SWAPS = 20

#: Of the control loop: microseconds from tick to tick, and seconds that it goes on.
PERIOD_US = 1000
SECONDS = 5
