// SPDX-License-Identifier: GPL-2.0-only
#include <linux/mm.h>
#include <linux/pfn_t.h>

vm_fault_t probe(struct vm_fault *vmf, struct page *page);

vm_fault_t probe(struct vm_fault *vmf, struct page *page)
{
	return vmf_insert_pfn_pmd(vmf, page_to_pfn_t(page), false);
}
