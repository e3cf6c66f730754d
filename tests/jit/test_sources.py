"""Flattening: each file once, compiler messages that point at the right file, and errors that name the fault."""

import pytest

from cupyattn.jit import sources


@pytest.fixture
def write(tmp_path):
    def write(**files):
        for name, text in files.items():
            path = tmp_path / (name.replace("__", "/") + (".cuh" if "__" in name else ".cu"))
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


def test_a_file_included_twice_is_inlined_once(write):
    root = write(
        kernel='#include "common/a.cuh"\n#include "common/b.cuh"\nint last;\n',
        common__a="#pragma once\nint a;\n",
        common__b='#pragma once\n#include "common/a.cuh"\nint b;\n',
    )
    text = sources.flatten("kernel", root)
    assert text.count("int a;") == 1
    assert text.index("int a;") < text.index("int b;") < text.index("int last;")
    assert "#include" not in text and "#pragma once" not in text


def test_line_directives_keep_the_original_places(write):
    root = write(
        kernel='// first\n#include "common/a.cuh"\nint here;  // kernel.cu:3\n',
        common__a="#pragma once\n\nint there;  // common/a.cuh:3\n",
    )
    place, number, seen = "", 0, []
    for line in sources.flatten("kernel", root).splitlines():
        if line.startswith("#line"):
            number, place = int(line.split()[1]), line.split('"')[1]
            continue
        if "int" in line:
            seen.append((line.split("// ")[1], f"{place}:{number}"))
        number += 1
    assert [said for said, _ in seen] == [found for _, found in seen] == ["common/a.cuh:3", "kernel.cu:3"]


def test_a_system_include_and_a_commented_one_stay(write):
    root = write(kernel='#include <cuda_fp16.h>\n// #include "nowhere.cuh"\n')
    assert "#include <cuda_fp16.h>\n" in sources.flatten("kernel", root)


def test_a_cycle_is_refused_with_its_path(write):
    forth, back = '#include "common/a.cuh"', '#include "common/b.cuh"'
    root = write(kernel=forth, common__a=back, common__b="\n" + forth)
    chain = "kernel.cu -> common/a.cuh -> common/b.cuh -> common/a.cuh"
    with pytest.raises(ValueError, match=f"common/b.cuh:2: include cycle {chain}"):
        sources.flatten("kernel", root)


def test_a_missing_include_is_named_with_its_line(write):
    root = write(kernel='int x;\n#include "common/gone.cuh"\n')
    with pytest.raises(FileNotFoundError, match='kernel.cu:2: #include "common/gone.cuh": no such file'):
        sources.flatten("kernel", root)


def test_an_include_inside_a_condition_is_refused(write):
    root = write(kernel='#if A\n#endif\n#ifdef B\n#include "common/a.cuh"\n#endif\n', common__a="")
    with pytest.raises(ValueError, match='kernel.cu:4: #include "common/a.cuh" inside #if'):
        sources.flatten("kernel", root)


@pytest.mark.parametrize("name", ["missing", "../kernel", ""])
def test_an_unknown_kernel_is_refused_with_the_known_ones(write, name):
    root = write(kernel="", other="")
    with pytest.raises(FileNotFoundError, match="expected one of kernel, other in"):
        sources.flatten(name, root)


def test_every_kernel_of_the_package_flattens():
    names = sources.names()
    assert names
    for name in names:
        assert '#include "' not in sources.flatten(name)
