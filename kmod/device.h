/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_DEVICE_H
#define TM_DEVICE_H

int __must_check tm_device_init(void);
void tm_device_exit(void);

#endif
