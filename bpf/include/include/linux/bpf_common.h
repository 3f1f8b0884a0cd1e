/* SPDX-License-Identifier: MIT */
/* Of no use to tracepoints; bcc includes it. */
