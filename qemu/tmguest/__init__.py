# SPDX-License-Identifier: MIT
"""The development board: kernels, build root and guests under QEMU."""
