/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef TM_MODEL_EVICT_H
#define TM_MODEL_EVICT_H

#include <linux/mm_types.h>
#include <linux/types.h>

struct file;
struct tm_client;
struct tm_model_evict;
struct tm_model_gen;
struct tm_model_piece;
struct vm_area_struct;
struct vm_fault;

/**
 * struct tm_model_evict_stats - what evictable generations have and have done
 * @evictable: bytes in memory that could go
 * @evicted: bytes that are in their files only
 * @reloads: pieces that came back
 * @failed: times that one did not
 */
struct tm_model_evict_stats {
	u64 evictable;
	u64 evicted;
	u64 reloads;
	u64 failed;
};

struct tm_model_evict *tm_model_evict_create(struct tm_model_gen *gen,
					     const struct file *from,
					     u64 offset);
void tm_model_evict_end(struct tm_model_evict *evict);
void tm_model_evict_destroy(struct tm_model_evict *evict);
int __must_check tm_model_evict_check(const struct tm_model_evict *evict);
void tm_model_evict_join(struct tm_model_gen *gen);
void tm_model_evict_leave(struct tm_model_piece *piece);

int __must_check tm_model_evict_pin(struct tm_model_gen *gen, u32 index);
void tm_model_evict_unpin(struct tm_model_gen *gen, u32 index);
vm_fault_t tm_model_evict_fault(struct tm_model_gen *gen, struct vm_fault *vmf,
				u32 *mapped);
void tm_model_evict_forked(struct vm_area_struct *vma);

u64 tm_model_evictable(void);
u64 tm_model_evict(u64 bytes);
u64 tm_model_evict_gen(struct tm_model_gen *gen, u64 bytes);
u64 tm_model_evict_client(const struct tm_client *client, u64 bytes);
u64 tm_model_evict_nodes(u64 nodes, u64 bytes);

void tm_model_evict_stats(struct tm_model_evict_stats *stats);
void tm_model_evict_gen_stats(struct tm_model_gen *gen,
			      struct tm_model_evict_stats *stats);

#endif
