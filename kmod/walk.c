// SPDX-License-Identifier: GPL-2.0-only
/*
 * /sys/kernel/debug/tensormem/walk: the page tables of a process, as the CPU reads
 * them. A range is written, its entries are read: every table's on the way down, once,
 * and every page's. What the bits mean is for user space to say.
 *
 * Why the tables stay while they are read: mmap_lock is held for reading and the
 * address is in an area, so munmap(), mremap() and exit cannot take them away; munmap()
 * frees tables with the lock held for reading too, but only those that no area is left
 * in. A table of pages may go all the same: file collapse (6.5) and MADV_DONTNEED
 * (PT_RECLAIM, 6.14) clear the entry for it under no lock that we have, and free it
 * after an RCU grace period. Hence each walk is one RCU section, reads each entry once
 * and goes on with what it has read. Tables that processes share (hugetlb) obey other rules:
 * such areas are not walked.
 */
#include <linux/capability.h>
#include <linux/hugetlb.h>
#include <linux/kstrtox.h>
#include <linux/log2.h>
#include <linux/minmax.h>
#include <linux/mm.h>
#include <linux/mmap_lock.h>
#include <linux/module.h>
#include <linux/overflow.h>
#include <linux/pgtable.h>
#include <linux/pid.h>
#include <linux/rcupdate.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/string.h>

#include "walk.h"

/* A pid and two numbers of 64 bits, and what is between them. */
#define TM_WALK_MAX	64

/**
 * struct tm_walk - what one open file looks at; under seq_file::lock
 * @mm: whose tables, or NULL before there is anything to look at; it does not keep the process's memory
 * @start: the first address
 * @end: what follows the last one
 * @at: where the walk is
 * @next: where it goes on
 * @before: the address before @at, if there was any
 * @begun: there was
 * @locked: between start and stop: mmap_lock is held
 */
struct tm_walk {
	struct mm_struct *mm;
	unsigned long start;
	unsigned long end;
	unsigned long at;
	unsigned long next;
	unsigned long before;
	bool begun;
	bool locked;
};

/* What is in an entry. */
enum tm_walk_what {
	TM_WALK_NONE,
	TM_WALK_TABLE,
	TM_WALK_LEAF,
	TM_WALK_OTHER,		/* nothing for the CPU: swap, migration */
};

/* Bits of an address that are the index in a table. The uppermost table has what is left of them. */
static unsigned int tm_walk_bits(unsigned int shift)
{
	return min_t(unsigned int, PAGE_SHIFT - 3,
		     ilog2(TASK_SIZE_64) - shift);
}

/* One line, unless the walk came by the same entry before. */
static void tm_walk_entry(struct seq_file *m, const char *level,
			  unsigned int shift, u64 descriptor,
			  enum tm_walk_what what, unsigned long frame)
{
	static const char *const names[] = { "none", "table", "leaf", "other" };
	const struct tm_walk *w = m->private;

	if (w->begun && w->before >> shift == w->at >> shift)
		return;
	seq_printf(m, "%lx %s %u %u %lu %llx %s", w->at >> shift << shift, level,
		   shift, tm_walk_bits(shift),
		   w->at >> shift & (PTRS_PER_PTE - 1), descriptor, names[what]);
	if (what == TM_WALK_TABLE || what == TM_WALK_LEAF)
		seq_printf(m, " %lx", frame);
	if (what == TM_WALK_LEAF)
		seq_printf(m, " %d", pfn_valid(frame) ? pfn_to_nid(frame) : -1);
	seq_putc(m, '\n');
}

/* The frame that a table is in. */
static unsigned long tm_walk_frame(const void *entry)
{
	return PHYS_PFN(virt_to_phys(entry));
}

/*
 * From here on up, a function for each level. It shows the entry for the address, goes
 * on to the table below, and returns log2 of what the last entry covers. Entries are read raw:
 * ptep_get() would hide the contiguous bit.
 */
static unsigned int tm_walk_pte(struct seq_file *m, pmd_t pmd)
{
	const struct tm_walk *w = m->private;
	pte_t entry = READ_ONCE(*pte_offset_kernel(&pmd, w->at));
	enum tm_walk_what what = pte_present(entry) ? TM_WALK_LEAF :
				 pte_none(entry) ? TM_WALK_NONE :
						   TM_WALK_OTHER;

	tm_walk_entry(m, "pte", PAGE_SHIFT, pte_val(entry), what,
		      pte_pfn(entry));
	return PAGE_SHIFT;
}

static unsigned int tm_walk_pmd(struct seq_file *m, pud_t *pud)
{
	const struct tm_walk *w = m->private;
	pmd_t entry = READ_ONCE(*pmd_offset(pud, w->at));
	enum tm_walk_what what = TM_WALK_TABLE;
	unsigned long frame = 0;

	if (pmd_none(entry))
		what = TM_WALK_NONE;
	else if (!pmd_present(entry))
		what = TM_WALK_OTHER;
	else if (pmd_leaf(entry))
		what = TM_WALK_LEAF;
	if (what == TM_WALK_TABLE)
		frame = tm_walk_frame(pte_offset_kernel(&entry, 0));
	else if (what == TM_WALK_LEAF)
		frame = pmd_pfn(entry);
	tm_walk_entry(m, "pmd", PMD_SHIFT, pmd_val(entry), what, frame);
	return what == TM_WALK_TABLE ? tm_walk_pte(m, entry) : PMD_SHIFT;
}

static unsigned int tm_walk_pud(struct seq_file *m, p4d_t *p4d)
{
	const struct tm_walk *w = m->private;
	pud_t *pud = pud_offset(p4d, w->at);
	pud_t entry = READ_ONCE(*pud);
	enum tm_walk_what what = TM_WALK_TABLE;
	unsigned long frame = 0;

	if (mm_pmd_folded(w->mm))
		return tm_walk_pmd(m, pud);
	if (pud_none(entry))
		what = TM_WALK_NONE;
	else if (!pud_present(entry))
		what = TM_WALK_OTHER;
	else if (pud_leaf(entry))
		what = TM_WALK_LEAF;
	if (what == TM_WALK_TABLE)
		frame = tm_walk_frame(pmd_offset(pud, w->at));
	else if (what == TM_WALK_LEAF)
		frame = pud_pfn(entry);
	tm_walk_entry(m, mm_pud_folded(w->mm) ? "pgd" : "pud", PUD_SHIFT,
		      pud_val(entry), what, frame);
	return what == TM_WALK_TABLE ? tm_walk_pmd(m, pud) : PUD_SHIFT;
}

static unsigned int tm_walk_p4d(struct seq_file *m, pgd_t *pgd)
{
	const struct tm_walk *w = m->private;
	p4d_t *p4d = p4d_offset(pgd, w->at);
	p4d_t entry = READ_ONCE(*p4d);
	bool none = p4d_none(entry);

	if (mm_pud_folded(w->mm))
		return tm_walk_pud(m, p4d);
	tm_walk_entry(m, mm_p4d_folded(w->mm) ? "pgd" : "p4d", P4D_SHIFT,
		      p4d_val(entry), none ? TM_WALK_NONE : TM_WALK_TABLE,
		      none ? 0 : tm_walk_frame(pud_offset(p4d, w->at)));
	return none ? P4D_SHIFT : tm_walk_pud(m, p4d);
}

static unsigned int tm_walk_pgd(struct seq_file *m)
{
	const struct tm_walk *w = m->private;
	pgd_t *pgd = pgd_offset(w->mm, w->at);
	pgd_t entry = READ_ONCE(*pgd);
	bool none = pgd_none(entry);

	if (mm_p4d_folded(w->mm))
		return tm_walk_p4d(m, pgd);
	tm_walk_entry(m, "pgd", PGDIR_SHIFT, pgd_val(entry),
		      none ? TM_WALK_NONE : TM_WALK_TABLE,
		      none ? 0 : tm_walk_frame(p4d_offset(pgd, w->at)));
	return none ? PGDIR_SHIFT : tm_walk_p4d(m, pgd);
}

/* Bring the walk to an address that may be walked. Return: whether there is one. */
static bool tm_walk_settle(struct tm_walk *w)
{
	struct vm_area_struct *vma;

	mmap_assert_locked(w->mm);
	while (w->at < w->end) {
		vma = find_vma(w->mm, w->at);
		if (!vma)
			break;
		w->at = max(w->at, vma->vm_start);
		if (!is_vm_hugetlb_page(vma))
			return w->at < w->end;
		w->at = vma->vm_end;
	}
	return false;
}

static void *tm_walk_start(struct seq_file *m, loff_t *pos)
{
	struct tm_walk *w = m->private;

	w->locked = false;
	if (!w->mm)
		return ERR_PTR(-ENODATA);
	if (!*pos) {
		w->at = w->start;
		w->begun = false;
	}
	if (!mmget_not_zero(w->mm))
		return ERR_PTR(-ESRCH);
	if (mmap_read_lock_killable(w->mm)) {
		mmput(w->mm);
		return ERR_PTR(-EINTR);
	}
	w->locked = true;
	return tm_walk_settle(w) ? w : NULL;
}

static void *tm_walk_next(struct seq_file *m, void *v, loff_t *pos)
{
	struct tm_walk *w = v;

	++*pos;
	w->before = w->at;
	w->begun = true;
	w->at = w->next;
	return tm_walk_settle(w) ? w : NULL;
}

static void tm_walk_stop(struct seq_file *m, void *v)
{
	struct tm_walk *w = m->private;

	if (!w->locked)
		return;
	mmap_read_unlock(w->mm);
	mmput(w->mm);
}

static int tm_walk_show(struct seq_file *m, void *v)
{
	struct tm_walk *w = v;
	unsigned int shift;

	rcu_read_lock();
	shift = tm_walk_pgd(m);
	rcu_read_unlock();
	/* Below the end of user space there is always a next one. */
	w->next = ((w->at >> shift) + 1) << shift;
	return 0;
}

static const struct seq_operations tm_walk_ops = {
	.start = tm_walk_start,
	.next = tm_walk_next,
	.stop = tm_walk_stop,
	.show = tm_walk_show,
};

/* "PID ADDRESS [LENGTH]"; a pid of 0 is whoever writes. */
static int tm_walk_parse(char *text, pid_t *pid, unsigned long *start,
			 unsigned long *length)
{
	char *words[3], *word;
	int nr = 0, err;

	text = strim(text);
	while ((word = strsep(&text, " "))) {
		if (nr == ARRAY_SIZE(words))
			return -EINVAL;
		words[nr++] = word;
	}
	if (nr < 2)
		return -EINVAL;
	*length = 1;
	err = kstrtoint(words[0], 10, pid) ?:
	      kstrtoul(words[1], 0, start) ?:
	      nr > 2 ? kstrtoul(words[2], 0, length) : 0;
	return err || *pid < 0 || !*length ? -EINVAL : 0;
}

/* Whose memory @pid is. Return: with mm_users taken, or an ERR_PTR. */
static struct mm_struct *tm_walk_mm(pid_t number)
{
	struct mm_struct *mm = NULL;
	struct task_struct *task;
	struct pid *pid;

	if (!number) {
		mm = get_task_mm(current);
		return mm ?: ERR_PTR(-ESRCH);
	}
	pid = find_get_pid(number);
	task = get_pid_task(pid, PIDTYPE_PID);
	put_pid(pid);
	if (!task)
		return ERR_PTR(-ESRCH);
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return ERR_PTR(-ESRCH);
	/* ptrace_may_access() is not for modules; who has this may access anybody. */
	if (mm != current->mm && !capable(CAP_SYS_PTRACE)) {
		mmput(mm);
		return ERR_PTR(-EPERM);
	}
	return mm;
}

/* Return: 0, -ERANGE, -EFAULT, -EOPNOTSUPP or -EINTR as in docs/ABI. */
static int tm_walk_check(struct mm_struct *mm, unsigned long start,
			 unsigned long end)
{
	struct vm_area_struct *vma;
	int err = 0;

	if (end > mm->task_size)
		return -ERANGE;
	if (mmap_read_lock_killable(mm))
		return -EINTR;
	vma = find_vma(mm, start);
	if (!vma || start < vma->vm_start)
		err = -EFAULT;
	else if (is_vm_hugetlb_page(vma))
		err = -EOPNOTSUPP;
	mmap_read_unlock(mm);
	return err;
}

static ssize_t tm_walk_write(struct file *file, const char __user *buf,
			     size_t count, loff_t *ppos)
{
	struct seq_file *m = file->private_data;
	unsigned long start, length, end;
	struct tm_walk *w = m->private;
	struct mm_struct *mm;
	char *text;
	pid_t pid;
	int err;

	if (count > TM_WALK_MAX)
		return -EINVAL;
	text = memdup_user_nul(buf, count);
	if (IS_ERR(text))
		return PTR_ERR(text);
	err = tm_walk_parse(text, &pid, &start, &length);
	kfree(text);
	if (err)
		return err;
	if (check_add_overflow(start, length, &end))
		return -ERANGE;

	mm = tm_walk_mm(pid);
	if (IS_ERR(mm))
		return PTR_ERR(mm);
	err = tm_walk_check(mm, start, end);
	if (err) {
		mmput(mm);
		return err;
	}
	mmgrab(mm);
	mmput(mm);

	mutex_lock(&m->lock);
	swap(w->mm, mm);
	w->start = start;
	w->end = end;
	/* What is read next is the beginning of this. */
	*ppos = 0;
	mutex_unlock(&m->lock);
	if (mm)
		mmdrop(mm);
	return count;
}

static int tm_walk_open(struct inode *inode, struct file *file)
{
	/* Frames are what /proc/PID/pagemap shows to nobody else. */
	if (!capable(CAP_SYS_ADMIN))
		return -EPERM;
	return __seq_open_private(file, &tm_walk_ops,
				  sizeof(struct tm_walk)) ? 0 : -ENOMEM;
}

static int tm_walk_release(struct inode *inode, struct file *file)
{
	struct seq_file *m = file->private_data;
	struct tm_walk *w = m->private;

	if (w->mm)
		mmdrop(w->mm);
	return seq_release_private(inode, file);
}

const struct file_operations tm_walk_fops = {
	.owner = THIS_MODULE,
	.open = tm_walk_open,
	.read = seq_read,
	.write = tm_walk_write,
	.llseek = seq_lseek,
	.release = tm_walk_release,
};
