# SPDX-License-Identifier: MIT
"""The demo: a small language model whose memory comes from the module."""
