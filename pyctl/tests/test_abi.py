# SPDX-License-Identifier: MIT
"""The mirror in abi.py against the header, as the C compiler reads it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tensormem import abi
from tensormem.device import DEFAULT_PATH

INCLUDE = Path(__file__).parents[2] / "kmod" / "include" / "uapi"
HEADER = INCLUDE / "linux" / "tensormem.h"
STRUCTS = [
    abi.Info, abi.Alloc, abi.Free, abi.Query, abi.Batch, abi.Quota, abi.SetNuma,
    abi.Export, abi.Relieve,
    abi.Budget, abi.Bandwidth,
    abi.KVGroup, abi.KVCreate, abi.KVInfo, abi.KVOpen, abi.KVClose, abi.KVExtend,
    abi.KVTruncate, abi.KVFork, abi.KVHash, abi.KVHashes, abi.KVAdopt, abi.KVQuery,
    abi.KVPack, abi.KVReset, abi.KVEvent,
    abi.ModelOpen, abi.ModelSlot, abi.ModelStage, abi.ModelWhich, abi.ModelAcquire, abi.ModelEvict,
    abi.ModelInfo, abi.ModelRemove,
    abi.RTOpen, abi.RTInfo, abi.RTReserve, abi.RTAlloc, abi.RTBlock, abi.RTPriority,
]  # fmt: skip


_TYPES = r"__u8|__s32|__u32|__u64|struct tensormem_kv_hash"


def _structs_in_header() -> dict[str, list[str]]:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    found = {}
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, flags=re.S | re.M):
        found[name] = re.findall(rf"(?:{_TYPES})\s+(\w+)(?:\[\w+\])?;", body)
        assert len(found[name]) == body.count(";"), f"{name} has a field of another type"
    return found


def _constants_in_header() -> list[str]:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)
    names = re.findall(r"^#define\s+(TENSORMEM_\w+)\s+[^\s\"]", text, flags=re.M)
    return names + re.findall(r"^\s+(TENSORMEM_\w+)\s*=", text, flags=re.M)


def test_every_string_of_the_header() -> None:
    strings = dict(re.findall(r'^#define\s+TENSORMEM_(\w+)\s+"(.*)"', HEADER.read_text(), re.M))
    ours = {"DEVICE": DEFAULT_PATH, "NL_FAMILY": abi.NL_FAMILY}
    assert {"DEVICE": DEFAULT_PATH} | strings == ours


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    compiler = os.environ.get("HOSTCC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    lines = []
    for name, fields in _structs_in_header().items():
        lines.append(f'printf("sizeof {name} %zu\\n", sizeof(struct {name}));')
        for field in fields:
            place = f"offsetof(struct {name}, {field})"
            lines.append(f'printf("{name}.{field} %zu\\n", {place});')
            size = f"sizeof(((struct {name} *)0)->{field})"
            lines.append(f'printf("size:{name}.{field} %zu\\n", {size});')
    lines += [
        f'printf("{name} %llu\\n", (unsigned long long){name});' for name in _constants_in_header()
    ]
    folder = tmp_path_factory.mktemp("abi")
    source = folder / "abi.c"
    body = "\n\t".join(lines)
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/tensormem.h>\n"
        f"int main(void)\n{{\n\t{body}\n\treturn 0;\n}}\n"
    )
    program = folder / "abi"
    subprocess.run(
        [compiler, "-Wall", "-Werror", "-I", str(INCLUDE), "-o", str(program), str(source)],
        check=True,
    )
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    return {key: int(value) for key, value in (line.rsplit(" ", 1) for line in out.splitlines())}


def test_header_has_no_struct_that_the_mirror_lacks() -> None:
    assert set(_structs_in_header()) == {s.c_name for s in STRUCTS}


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: str(s.c_name))
def test_layout(struct: type[abi.Struct], compiled: dict[str, int]) -> None:
    name = struct.c_name
    assert ctypes.sizeof(struct) == compiled[f"sizeof {name}"]
    mirrored = [field[0] for field in struct._fields_]
    assert mirrored == _structs_in_header()[name]
    for field in mirrored:
        place = getattr(struct, field)
        assert place.offset == compiled[f"{name}.{field}"], field
        assert place.size == compiled[f"size:{name}.{field}"], field


def test_every_constant_of_the_header(compiled: dict[str, int]) -> None:
    ours = {"TENSORMEM_ABI_VERSION": abi.ABI_VERSION, "TENSORMEM_IOC_MAGIC": abi.IOC_MAGIC}
    ours |= {f"TENSORMEM_KIND_{k.name}": int(k) for k in abi.Kind}
    ours |= {f"TENSORMEM_POOL_{p.name}": int(p) for p in abi.Pool}
    ours |= {f"TENSORMEM_MAPPING_{m.name}": int(m) for m in abi.Mapping}
    ours |= {f"TENSORMEM_NUMA_{n.name}": int(n) for n in abi.Numa}
    ours |= {f"TENSORMEM_{f.name}": int(f) for f in abi.AllocFlag}
    ours |= {f"TENSORMEM_EXPORT_{f.name}": int(f) for f in abi.ExportFlag}
    ours |= {f"TENSORMEM_KV_{r.name}": int(r) for r in abi.KVRule}
    ours |= {f"TENSORMEM_KV_{t.name}": int(t) for t in abi.KVEventType}
    for enum in (abi.ModelState, abi.OpenFlag, abi.StageFlag):
        ours |= {f"TENSORMEM_MODEL_{m.name}": int(m) for m in enum}
    ours |= {f"TENSORMEM_RT_{f.name}": int(f) for f in abi.RTFlag}
    ours |= {f"TENSORMEM_RELIEF_{r.name}": int(r) for r in abi.Relief}
    ours |= {f"TENSORMEM_NL_GROUP_{g.name}": int(g) for g in abi.NLGroup}
    ours |= {f"TENSORMEM_NL_{c.name}": int(c) for c in abi.NLCommand}
    ours |= {f"TENSORMEM_NL_A_{a.name}": int(a) for a in abi.NLAttribute}
    ours |= {f"TENSORMEM_PRESSURE_{p.name}": int(p) for p in abi.PressureLevel}
    ours["TENSORMEM_NL_VERSION"] = abi.NL_VERSION
    ours |= {
        f"TENSORMEM_{name}": value
        for name, value in vars(abi).items()
        if name.startswith(("IOC_", "KV_", "MODEL_", "RT_", "RELIEF_", "SHA256"))
        and name != "IOC_MAGIC"
    }
    names = _constants_in_header()
    assert len(names) >= 94
    assert ours == {name: compiled[name] for name in names}


def test_iowr_of_another_size() -> None:
    assert abi.iowr(0x10, ctypes.sizeof(abi.Alloc)) == abi.IOC_ALLOC
    assert abi.iowr(0x10, 32) != abi.IOC_ALLOC
    assert abi.iowr(0x10, 32) & 0xFFFF == abi.IOC_ALLOC & 0xFFFF
