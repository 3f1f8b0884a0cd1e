// SPDX-License-Identifier: GPL-2.0-only
/* The ground the other tests stand on: the host platform, ids and geometry. */
#include "core/geometry.h"
#include "harness.h"

TEST(platform_bit_search)
{
	for (unsigned int i = 0; i < 64; i++) {
		CHECK_EQ(tm_ctz64(1ull << i), i);
		CHECK_EQ(tm_ctz64(~0ull << i), i);
	}
	for (unsigned int i = 0; i < 32; i++) {
		CHECK_EQ(tm_fls32(1u << i), i);
		CHECK_EQ(tm_fls32(~0u >> (31 - i)), i);
	}
}

static void search_zero(void *unused)
{
	(void)unused;
	tm_host_expect_warnings(tm_ctz64(0));
}

static void unheld(void *lock)
{
	tm_assert_locked((tm_lock_t *)lock);
}

static void warn(void *unused)
{
	(void)unused;
	tm_warn_on(true);
}

TEST(platform_is_strict)
{
	tm_lock_t lock = { .held = false };

	tm_check_aborts("a bit search of 0", search_zero, NULL);
	tm_check_aborts("a lock that is not held", unheld, &lock);
	tm_check_aborts("an unexpected warning", warn, NULL);

	tm_host_lock(&lock);
	tm_assert_locked(&lock);
	tm_host_unlock(&lock);
	CHECK(!tm_warn_on(false));
	tm_host_expect_warnings(2);
	CHECK(tm_warn_on(true));
	CHECK_EQ(tm_host_missing_warnings(), 1);
	CHECK_EQ(tm_host_missing_warnings(), 0);
}

TEST(platform_tables)
{
	static const char zero[64];
	void *table;

	for (unsigned int nth = 1; nth <= 3; nth++) {
		tm_host_fail_table(nth);
		for (unsigned int i = 1; i <= 3; i++) {
			table = tm_table_alloc(8, 8);
			CHECK_EQ(table == NULL, i == nth);
			CHECK_EQ(tm_host_tables(), i != nth);
			if (table)
				CHECK(!memcmp(table, zero, sizeof(zero)));
			tm_table_free(table);
			CHECK_EQ(tm_host_tables(), 0);
		}
	}
}

TEST_PAGE_SIZES(geometry_ids)
{
	struct tm_geometry g = tm_geometry(page_shift);
	u32 pages = 2u * 1024 * 1024 / (1u << page_shift);
	/* The last chunk a pool may have. */
	static const u32 chunks[] = {
		0, 1, 2, 1000, (TM_NONE >> TM_MAX_CHUNK_ORDER) - 1,
	};

	CHECK_EQ(TM_CHUNK_SIZE, 2 * 1024 * 1024);
	CHECK_EQ(g.page_shift, page_shift);
	CHECK_EQ(tm_chunk_pages(g), pages);
	for (u32 i = 0; i < sizeof(chunks) / sizeof(*chunks); i++) {
		for (u32 p = 0; p < pages; p++) {
			struct tm_page_id id = tm_page_id(
				g, (struct tm_chunk_id){ chunks[i] }, p);

			CHECK_EQ(id.v, (u64)chunks[i] * pages + p);
			CHECK(id.v != TM_NONE);
			CHECK_EQ(tm_page_chunk(g, id).v, chunks[i]);
			CHECK_EQ(tm_page_index(g, id), p);
		}
	}
}
