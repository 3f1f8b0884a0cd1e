/* SPDX-License-Identifier: MIT */
/* bcc brings one of its own. */
