/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * An arena of the RT pool: clients that share one heap, what is reserved for each, who
 * waits for memory, and which blocks may be moved to make room.
 *
 * Reserved means laid aside. A reservation is a list of classes (size, count); for each, a run is taken from the heap when
 * it is admitted and divided into items. A client that has fewer than @count items of the class that serves a size gets one:
 * a free item is on the class's own list, whatever anybody else does and however scattered the heap is. That
 * is why a reservation is a list of sizes and not a number of bytes: with free choice of sizes, a promise of b bytes takes
 * up to b * (1 + log2(largest / smallest) / 2) of memory to keep (J. M. Robson, "Bounds for Some Functions Concerning Dynamic Storage
 * Allocation", J. ACM 21, 1974).
 *
 * An allocation is served by the first of these that can:
 *
 *   1. the class with the smallest items that are large enough; only that one, because the items of larger
 *      classes are promised to larger blocks
 *   2. the heap, unless somebody of the same or a higher priority waits for it; a reservation's run comes from there, too
 *
 * and if the caller has time, he joins those who wait (tm_rt_wait()), compacts when told to, a block at a time (tm_rt_move_begin()), and
 * sleeps. He waits before he compacts: what room he makes is then his and not of whoever comes along.
 * Who waits is served by priority, then in order of arrival; a first one that cannot be served yet is not overtaken by those behind it,
 * or large requests would starve. What is freed is handed to the first waiter there and then (tm_rt_serve()): who comes along cannot
 * take it. A call serves one at most, and who was served serves the next: so a free takes a constant number of steps.
 * Who waits for a size that a class of his serves waits for its items as well, in order of arrival, and gets the first that is freed, whoever
 * is before him in the other queue. A class that is reserved later does nothing for him.
 *
 * A block is named by a handle, never 0: that of a fixed block or an item is its start + 1; that of a movable one is
 * TM_RT_HANDLE_MOVABLE and an entry of a table, which says where it is. Movable blocks are pinned while somebody knows their address.
 * Entries are used in a circle, so that an old handle is nobody's for as long as possible.
 *
 * A movable block that is freed while it is being moved is nobody's from then on; its memory is free when the move ends.
 *
 * Items are tagged when they are first allocated, and the tags stay when a reservation goes: so that neither takes a step for
 * each item. An item's tag counts if the class it names has an item there that was ever allocated.
 *
 * Every call takes a constant number of steps, but for init, exit and check. Memory is counted in granules (core/heap.h).
 *
 * Context: all functions but init and exit need the lock and never sleep.
 */
#ifndef TM_CORE_RT_H
#define TM_CORE_RT_H

#include "core/heap.h"

#define TM_RT_CLIENTS		255
#define TM_RT_CLASSES		16
/* The higher the number the sooner served, as for SCHED_FIFO. */
#define TM_RT_PRIORITIES	100
#define TM_RT_MOVABLE		65536
/* Granules of the longest movable block: what one step of compaction copies at most. */
#define TM_RT_STEP		128

/* A handle's bit; below it the entry. */
#define TM_RT_HANDLE_MOVABLE	(1u << 31)

/* Flags of an allocation; one of them or none. */
#define TM_RT_ALLOC_MOVABLE	(1u << 0)	/* from the heap; born pinned */
#define TM_RT_ALLOC_RESERVED	(1u << 1)	/* from the reservation or not at all */

struct tm_rt_waiter;

/**
 * struct tm_rt_class - a part of a reservation: items of one size
 * @size: granules of an item; 0: no such class
 * @count: items
 * @used: those allocated
 * @fresh: items that were never allocated are the last @count - @fresh
 * @run: the block that they lie in; its first granule and its last are not an item's
 * @free: an item on the list of free ones, linked by their nodes; or TM_HEAP_NONE
 * @waiting: first of those that wait for an item; NULL: none, and always so while one is left
 */
struct tm_rt_class {
	u32 size;
	u32 count;
	u32 used;
	u32 fresh;
	u32 run;
	u32 free;
	struct tm_rt_waiter *waiting;
};

/**
 * struct tm_rt_client - one who allocates; embedded in what has it
 * @index: its place in tm_rt::client
 * @priority: below TM_RT_PRIORITIES
 * @class: its reservation, in no order
 * @sizes: those of its classes, ascending; then ~0
 * @order: the classes in that order; then the places of @class that are not in use
 * @nr_classes: how many it has
 * @blocks: its first block in the heap, runs too, or TM_HEAP_NONE; linked both ways by their nodes
 * @nr_blocks: blocks and items allocated
 * @used: granules in them, and not in what is reserved and unused
 * @reserved: granules in runs
 */
struct tm_rt_client {
	u32 index;
	u32 priority;
	struct tm_rt_class class[TM_RT_CLASSES];
	u32 sizes[TM_RT_CLASSES];
	u8 order[TM_RT_CLASSES];
	u32 nr_classes;
	u32 blocks;
	u32 nr_blocks;
	u32 used;
	u32 reserved;
};

/**
 * struct tm_rt_block - where a block is
 * @handle: its name
 * @start: its first granule
 * @length: granules that are the caller's: what was asked for or more
 */
struct tm_rt_block {
	u32 handle;
	u32 start;
	u32 length;
};

/* The rings that a waiter is in. */
enum tm_rt_ring {
	TM_RT_BY_PRIORITY,	/* tm_rt::waiting; then tm_rt::handed */
	TM_RT_BY_CLASS,		/* tm_rt_class::waiting */
	TM_RT_RINGS,
};

enum tm_rt_waiter_state {
	TM_RT_IDLE,
	TM_RT_WAITING,
	TM_RT_SERVED,		/* @block is its client's */
};

/**
 * struct tm_rt_waiter - a request that waits; its owner's memory
 * @client: who; set by the owner, as are
 * @size: granules
 * @flags: TM_RT_ALLOC_MOVABLE or 0: what tm_rt_alloc() has just refused with -ENOSPC
 * @state: enum tm_rt_waiter_state
 * @priority: its client's when it began to wait
 * @frees: tm_rt::frees when it was last told to compact
 * @class: the class that serves it, too, or NULL
 * @block: what it got
 * @next: @prev: in rings
 */
struct tm_rt_waiter {
	struct tm_rt_client *client;
	u32 size;
	u32 flags;
	u32 state;
	u32 priority;
	u32 frees;
	struct tm_rt_class *class;
	struct tm_rt_block block;
	struct tm_rt_waiter *next[TM_RT_RINGS];
	struct tm_rt_waiter *prev[TM_RT_RINGS];
};

enum tm_rt_movable_state {
	TM_RT_UNUSED,
	TM_RT_RESTING,
	TM_RT_MOVING,
	TM_RT_ABANDONED,	/* freed while it was being moved */
};

/**
 * struct tm_rt_movable - an entry of the table of movable blocks
 * @start: where the block is; of an unused entry the next one in their ring
 * @pins: how often it is pinned
 * @state: enum tm_rt_movable_state
 * @client: whose it is
 */
struct tm_rt_movable {
	u32 start;
	u16 pins;
	u8 state;
	u8 client;
};

/**
 * struct tm_rt - an arena
 * @heap: its memory
 * @client: by index; NULL: nobody
 * @places: bit i of the whole: @client[i] is somebody
 * @movable: the table of movable blocks, @max_movable long
 * @max_movable: how many there may be
 * @nr_movable: how many entries are in use
 * @unused: the entry that nobody has since the shortest time; the next in the ring is the one that nobody has since the longest.
 *          Without meaning when all are in use
 * @waiting: first of those that wait, by priority; NULL: none
 * @levels: bit p: somebody of priority p waits
 * @handed: first of those that got an item and have not been named by tm_rt_serve(); NULL: none
 * @frees: counts what might let compaction succeed that failed before: what is freed in the heap, and last unpins
 * @moving: somebody copies a block
 * @moves: blocks that were moved, ever
 */
struct tm_rt {
	struct tm_heap heap;
	struct tm_rt_client *client[TM_RT_CLIENTS];
	u64 places[TM_RT_CLIENTS / 64 + 1];
	struct tm_rt_movable *movable;
	u32 max_movable;
	u32 nr_movable;
	u32 unused;
	struct tm_rt_waiter *waiting[TM_RT_PRIORITIES];
	u64 levels[2];
	struct tm_rt_waiter *handed;
	u32 frees;
	bool moving;
	u64 moves;
};

/* Return: 0, -EINVAL for sizes that cannot be, -ENOMEM. Context: may sleep; no lock. */
int __must_check tm_rt_init(struct tm_rt *rt, tm_raw_lock_t *lock, u32 size,
			    u32 max_movable);
void tm_rt_exit(struct tm_rt *rt);

/* Return: 0, -EINVAL for no such priority, -ENOSPC for more than TM_RT_CLIENTS. */
int __must_check tm_rt_join(struct tm_rt *rt, struct tm_rt_client *client,
			    u32 priority);
/*
 * Take one thing of a client that is going: a block, a run with its items, or its place. Its waiters have to be cancelled before. Return: whether
 * there is more.
 */
bool __must_check tm_rt_leave(struct tm_rt *rt, struct tm_rt_client *client);

/*
 * Return: 0; -EINVAL for a count of 0, or a size of 0 or beyond the arena; -EEXIST for a class of that size; -ENOSPC for no room in the heap,
 * others that wait for it, or more than TM_RT_CLASSES.
 */
int __must_check tm_rt_reserve(struct tm_rt *rt, struct tm_rt_client *client,
			       u32 size, u32 count);
/* Return: 0, -ENOENT for no class of that size, -EBUSY while an item of it is allocated. */
int __must_check tm_rt_unreserve(struct tm_rt *rt, struct tm_rt_client *client,
				 u32 size);

/*
 * Return: 0; -EINVAL for a size of 0 or beyond the arena, a movable one beyond TM_RT_STEP, or flags that cannot be; -ENOSPC for no room now: wait or
 * give up; -ENFILE for more than max_movable.
 */
int __must_check tm_rt_alloc(struct tm_rt *rt, struct tm_rt_client *client,
			     u32 size, u32 flags, struct tm_rt_block *block);
/* Return: 0, or -ENOENT for what is no block of this client's. */
int __must_check tm_rt_free(struct tm_rt *rt, struct tm_rt_client *client,
			    u32 handle);
/* Return: 0; -ENOENT; -EAGAIN while it is being copied; -EOVERFLOW for 65535 pins. A fixed block is always pinned: no more than 0 or -ENOENT. */
int __must_check tm_rt_pin(struct tm_rt *rt, struct tm_rt_client *client,
			   u32 handle, struct tm_rt_block *block);
/* Return: 0; -ENOENT for what is no movable block of this client's; -EINVAL when it is not pinned. */
int __must_check tm_rt_unpin(struct tm_rt *rt, struct tm_rt_client *client,
			     u32 handle);

/*
 * Join those who wait; then tm_rt_serve(), which may tell the caller itself to compact. Who is told so does steps of compaction up to the second
 * TM_RT_STEP_ROUND (the first may end a round that somebody else began), calls tm_rt_serve() after each tm_rt_move_end(), and stops once it is SERVED. If @frees is
 * another one than when it began, it has been told again meanwhile, and begins again; else it sleeps.
 */
void tm_rt_wait(struct tm_rt *rt, struct tm_rt_waiter *waiter);
/* Stop waiting. Return: whether it had been served meanwhile: then the block is its client's. */
bool __must_check tm_rt_cancel(struct tm_rt *rt, struct tm_rt_waiter *waiter);
/*
 * To be called after tm_rt_wait() and whatever may make room (free, unpin, unreserve, leave, move_end), and by who was served or stops waiting;
 * before the lock is dropped. Return: whom to wake: SERVED; or still WAITING, because enough is free, but in pieces, and it should compact: it is told once for each value of
 * tm_rt::frees; or NULL. One that waits for a movable block while all entries are in use is first like any other.
 */
struct tm_rt_waiter *tm_rt_serve(struct tm_rt *rt);

enum tm_rt_step {
	TM_RT_STEP_NOTHING,	/* looked at a block; go on */
	TM_RT_STEP_MOVE,	/* copy what @move says, then tm_rt_move_end() */
	TM_RT_STEP_ROUND,	/* that was the arena's last block: begin again, or wait */
	TM_RT_STEP_BUSY,	/* somebody else is copying */
};

/* Copy @length granules, TM_RT_STEP at most, from @from to @to; they may overlap. */
struct tm_rt_move {
	u32 from;
	u32 to;
	u32 length;
};

/*
 * A step of compaction: look at one block. Movable blocks that are not pinned slide down into the hole before them, so that a
 * round over the arena leaves one hole between any two blocks that stay. Nobody sees a block while it is copied.
 */
enum tm_rt_step tm_rt_move_begin(struct tm_rt *rt, struct tm_rt_move *move);
void tm_rt_move_end(struct tm_rt *rt, const struct tm_rt_move *move);

/* Everything by tm_warn_on(), in as many steps as there are granules. For tests. */
void tm_rt_check(const struct tm_rt *rt);

#endif
