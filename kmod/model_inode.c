// SPDX-License-Identifier: GPL-2.0-only
/*
 * The inodes behind descriptors of slots and generations: an owner, a group, a mode
 * and a size that the kernel's own system calls see.
 *
 * They live on a mount that exists as long as one of them does and holds the module, as
 * DRM's do: a file lets go of its mount last of all, when it has let go of the module's
 * operations already.
 */
#include <linux/err.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/fs_context.h>
#include <linux/module.h>
#include <linux/mount.h>
#include <linux/pseudo_fs.h>

#include "compat.h"
#include "model_inode.h"

#define TM_MODEL_MAGIC	0x544d4d44	/* "TMMD" */

static struct vfsmount *tm_model_mount;
static int tm_model_pins;

static int tm_model_fs_init(struct fs_context *fc)
{
	fc->s_iflags |= SB_I_NOEXEC | SB_I_NODEV;
	return init_pseudo(fc, TM_MODEL_MAGIC) ? 0 : -ENOMEM;
}

static struct file_system_type tm_model_fs = {
	.owner = THIS_MODULE,
	.name = "tensormem-model",
	.init_fs_context = tm_model_fs_init,
	.kill_sb = kill_anon_super,
};

static int tm_model_slot_setattr(tm_idmap *idmap, struct dentry *dentry,
				 struct iattr *attr)
{
	/* A slot has no contents. */
	if (attr->ia_valid & ATTR_SIZE)
		return -EINVAL;
	return simple_setattr(idmap, dentry, attr);
}

const struct inode_operations tm_model_slot_inode = {
	.setattr = tm_model_slot_setattr,
};

/* Not for root either, whom the mode does not stop. */
static int tm_model_gen_setattr(tm_idmap *idmap, struct dentry *dentry,
				struct iattr *attr)
{
	return -EPERM;
}

const struct inode_operations tm_model_gen_inode = {
	.setattr = tm_model_gen_setattr,
};

/**
 * tm_model_inode - make an inode of the caller's
 * @mode: its permissions
 * @ops: its operations
 *
 * The module is held until tm_model_inode_put().
 *
 * Context: may sleep. Return: the inode or an ERR_PTR: -ENOMEM.
 */
struct inode *tm_model_inode(umode_t mode, const struct inode_operations *ops)
{
	struct inode *inode;
	int err;

	err = simple_pin_fs(&tm_model_fs, &tm_model_mount, &tm_model_pins);
	if (err)
		return ERR_PTR(err);
	inode = alloc_anon_inode(tm_model_mount->mnt_sb);
	if (IS_ERR(inode)) {
		simple_release_fs(&tm_model_mount, &tm_model_pins);
		return inode;
	}
	inode->i_mode = S_IFREG | mode;
	inode->i_op = ops;
	return inode;
}

/* Context: may sleep. */
void tm_model_inode_put(struct inode *inode)
{
	iput(inode);
	simple_release_fs(&tm_model_mount, &tm_model_pins);
}

/**
 * tm_model_inode_file - open a descriptor
 * @inode: of what
 * @name: what /proc shows
 * @flags: O_RDONLY or O_RDWR
 * @fops: its operations
 * @data: its private_data
 *
 * Context: may sleep. Return: the file or an ERR_PTR: -ENOMEM, -ENFILE.
 */
struct file *tm_model_inode_file(struct inode *inode, const char *name,
				 int flags, const struct file_operations *fops,
				 void *data)
{
	struct file *file;

	ihold(inode);
	file = alloc_file_pseudo(inode, tm_model_mount, name, flags | O_CLOEXEC,
				 fops);
	if (IS_ERR(file)) {
		iput(inode);
		return file;
	}
	/* What open(2) sees to, when a file has a name. */
	__module_get(fops->owner);
	file->f_mode |= FMODE_PREAD;
	file->private_data = data;
	return file;
}
