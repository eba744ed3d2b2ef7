"""Files that want to run code, to fill the memory, or to take for ever: each is refused in under a second, and nothing is run."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from releases import case_split, npy_bytes, pickled, toy_inferences, vocabulary_class, words, write_arrays

from case_fast import cli
from case_fast.errors import DataError
from case_fast.importing import read_released

MODULE = "a_module_that_tells_when_it_is_imported"


def named(module: str, name: str, arguments: bytes = b"\x8c\x02id\x85", protocol: bytes = b"\x80\x04") -> bytes:
    """A call of a name that stands on the stack."""
    parts = b"".join(b"\x8c" + bytes([len(part)]) + part for part in (module.encode(), name.encode()))
    return protocol + parts + b"\x93" + arguments + b"R."


def line(module: str, name: str, arguments: bytes = b"(Vid\ntR.") -> bytes:
    """A call of a name in lines, as protocol 0 has it."""
    return f"c{module}\n{name}\n".encode() + arguments


class Calls:
    """A value that pickle writes as a call."""

    def __init__(self, function: Callable, *arguments: object, state: object = None):
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def with_vocabulary(*left: object, protocol: int = 4) -> bytes:
    """A list of values, of which the last one is an instance of the vocabulary's class with these attributes."""
    with vocabulary_class() as lang:
        made = lang()
        made.word2index = left
        return pickle.dumps(made, protocol)


def dtype(code: str, state: bytes) -> bytes:
    return b"\x80\x04cnumpy\ndtype\n\x8c" + bytes([len(code)]) + code.encode() + b"\x89\x88\x87R" + state


PLAIN_STATE = b"(K\x03\x8c\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def scalar(code: str, raw: bytes) -> bytes:
    held = b"B" + struct.pack("<I", len(raw)) + raw
    return b"\x80\x04cnumpy.core.multiarray\nscalar\n" + dtype(code, PLAIN_STATE)[2:] + held + b"\x86R."


def array(shape: bytes, code: str, raw: bytes) -> bytes:
    """An array that is filled by its state."""
    start = b"\x80\x04cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR"
    return start + b"(K\x01" + shape + dtype(code, PLAIN_STATE)[2:] + b"\x89" + raw + b"tb."


def rows_again(times: int) -> bytes:
    """A release whose contexts are one list of lists, each the same again."""
    context = [["w" * 1000] * 300] * 301
    part = {"context": [context] * times, "target": [["a"]] * times, "emotion": ["sad"] * times}
    return pickle.dumps([part, part, part, {"word2index": {}}], 4)


def doubled(levels: int, pair: bytes) -> bytes:
    """A value that holds the one before it twice, again and again."""
    return b"\x80\x04](K\x01e\x94" + b"".join(pair % bytes([level]) for level in range(levels)) + b"."


def npy(header: str, values: bytes = b"") -> bytes:
    raw = header.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + values


HOSTILE: dict[str, tuple[bytes, str]] = {
    # names: what they would call is never looked up
    "os.system": (pickle.dumps(Calls(os.system, "touch canary")), "system"),
    "os.system of protocol 0": (pickle.dumps(Calls(os.system, "touch canary"), 0), "system"),
    "posix.system by name": (named("posix", "system"), "posix.system"),
    "nt.system": (line("nt", "system"), "nt.system"),
    "eval": (pickle.dumps(Calls(eval, "open('canary', 'w')")), "builtins.eval"),
    "eval of Python 2": (line("__builtin__", "eval"), "__builtin__.eval"),
    "exec": (pickle.dumps(Calls(exec, "open('canary', 'w')")), "builtins.exec"),
    "open": (pickle.dumps(Calls(open, "canary", "w")), "open"),
    "getattr": (pickle.dumps(Calls(getattr, "text", "upper")), "builtins.getattr"),
    "__import__": (named("builtins", "__import__", b"\x8c" + bytes([len(MODULE)]) + MODULE.encode() + b"\x85"), "__import__"),
    "a module that runs when it is imported": (line(MODULE, "anything"), MODULE),
    "importlib": (named("importlib", "import_module"), "importlib.import_module"),
    "subprocess": (named("subprocess", "Popen"), "subprocess.Popen"),
    "pickle itself": (named("_pickle", "loads"), "_pickle.loads"),
    "numpy.load": (named("numpy", "load"), "numpy.load"),
    "numpy's test runner": (named("numpy.testing._private.utils", "runstring"), "runstring"),
    "torch.load": (named("torch", "load"), "torch.load"),
    "operator": (named("operator", "attrgetter"), "operator.attrgetter"),
    "a decoder": (line("_codecs", "decode"), "_codecs.decode"),
    "a decompressor by codec": (named("_codecs", "encode", b"\x8c\x01a\x8c\x04zlib\x86"), "_codecs.encode is called"),
    "a name behind an allowed one": (named("src.utils.data.loader", "Lang.__init__.__globals__"), "Lang.__init__.__globals__"),
    "a name behind an allowed module": (named("numpy", "ndarray.__class__"), "ndarray.__class__"),
    "a path as a module": (named("../../../etc/passwd", "x"), "../../../etc/passwd"),
    "a path in a name": (line("numpy", "../../canary"), "../../canary"),
    "a name with NUL and escapes": (named("os\x00\x1b[31m", "sys\x00tem"), "it names"),
    "a name that is none": (b"\x80\x04K\x01K\x02\x93.", "it names '?.?'"),
    "a long name": (b"c" + b"a" * 100_000 + b"\nb\n.", "more than 200 characters"),
    # what is allowed, used for something else
    "list is no function": (line("builtins", "list", b"(tR."), "builtins.list is called"),
    "object is none either": (line("__builtin__", "object", b"(tR."), "object is called"),
    "ndarray called": (line("numpy", "ndarray", b"(tR."), "numpy.ndarray is called"),
    "another class's instance": (b"\x80\x02cnumpy\nndarray\n)\x81.", "an instance of numpy.ndarray"),
    "an instance with arguments": (b"\x80\x02csrc.utils.data.loader\nLang\nN\x85\x81.", "an instance of src.utils"),
    "another base": (line("copy_reg", "_reconstructor", b"(csrc.utils.data.loader\nLang\nc__builtin__\nlist\n(ltR."),
                     "_reconstructor is"),
    "another factory": (line("collections", "defaultdict", b"(cnumpy\nndarray\ntR."), "defaultdict is called"),
    "a scalar that is a pickle": (scalar("O8", pickle.dumps(Calls(os.system, "touch canary"))), "an array of O8"),
    "a dtype of void": (dtype("V8", b"."), "numpy.dtype is called"),
    "a dtype with fields": (dtype("i4", b"(K\x03\x8c\x01|N\x8c\x01a\x85}tb."), "a state that nothing"),
    "a name as data": (b"\x80\x02]cnumpy\nndarray\na.", "numpy.ndarray stands where data should"),
    "a name within a tuple": (b"\x80\x02]cnumpy\nndarray\n\x85a.", "numpy.ndarray stands where data should"),
    "a call of a text": (b"\x80\x02X\x02\x00\x00\x00id)R.", "a call of what is no function"),
    "a call of a list": (b"\x80\x02])R.", "a call of what is no function"),
    # opcodes that would make objects
    "INST": (b"(Vtouch canary\nios\nsystem\n.", "INST: an instance of os.system"),
    "INST with a terminal's codes": (b"(i\x1b[2J\nsystem\n.", r"INST: an instance of \\x1b\[2J.system"),
    "INST of the vocabulary": (b"(isrc.utils.data.loader\nLang\n.", "INST"),
    "OBJ": (b"(cnumpy\nndarray\nVa\no.", "opcode OBJ"),
    "NEWOBJ_EX": (b"\x80\x04csrc.utils.data.loader\nLang\n)}\x92.", "opcode NEWOBJ_EX"),
    "BUILD of a dict": (b"\x80\x02}}b.", "a state that nothing"),
    "BUILD of a list": (b"\x80\x02]N}\x86b.", "a state that nothing"),
    "BUILD of a name": (b"\x80\x02cnumpy\nndarray\n}b.", "a state that nothing"),
    "BUILD twice": (with_vocabulary(1)[:-1] + b"}b.", "a state that nothing"),
    "EXT1": (b"\x80\x02\x82\x01.", "opcode EXT1"), "EXT2": (b"\x80\x02\x83\x01\x00.", "opcode EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "opcode EXT4"),
    "PERSID": (b"Pos.system\n.", "opcode PERSID"), "BINPERSID": (b"\x80\x02X\x01\x00\x00\x00aQ.", "opcode BINPERSID"),
    "a buffer elsewhere": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    # depth, cycles, shared values
    "lists in lists": (b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "100 deep"),
    "marks in marks": (b"\x80\x02" + b"(" * 1_000_000, "100 deep"),
    "tuples in tuples": (b"\x80\x02)" + b"\x85" * 500_000 + b".", "100 deep"),
    "dicts in dicts": (b"\x80\x02" + b"}K\x01" * 50_000 + b"N" + b"s" * 50_000 + b".", "100 deep"),
    "lists in lists, by the memo": (
        b"\x80\x04]\x94" + b"".join(b"](j" + struct.pack("<I", i) + b"e\x94" for i in range(5000)) + b".", "100 deep"),
    "a list that holds itself": (b"\x80\x02]q\x00h\x00a.", "holds itself"),
    "a dict that holds itself": (b"\x80\x02}q\x00K\x01h\x00s.", "holds itself"),
    "two lists that hold each other": (b"\x80\x02]q\x00]q\x01h\x00ah\x01a.", "changed after"),
    "a list that grows later": (b"\x80\x02]q\x00]h\x00ah\x00K\x01a.", "changed after"),
    "a value twice, 99 times": (doubled(200, b"](h%sh\x00e\x94"), "deep"),
    "one turn a billion times": (rows_again(3000), "more text than 64 characters for each byte"),
    "a tuple as a key": (b"\x80\x02}K\x01\x85Ns.", "a key of a dict"),
    "a list as a member": (b"\x80\x04\x8f(]\x90.", "a member of a set"),
    # lengths and numbers
    "a memo of four billion": (b"\x80\x02Nr\xff\xff\xff\xff.", "memo 4,294,967,295"),
    "a memo beyond all numbers": (b"Np" + b"9" * 31 + b"\n.", "memo 9,999"),
    "a memo that holds nothing": (b"\x80\x02h\x07.", "memo 7"),
    "a text of exabytes": (b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.", "it announces 9,223"),
    "bytes of exabytes": (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "it announces"),
    "a bytearray of exabytes": (b"\x80\x05\x96" + b"\xff" * 8 + b".", "it announces"),
    "a frame of exabytes": (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "it announces"),
    "an integer of gigabytes": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "more than 64 bits"),
    "an integer of 2040 bits": (b"\x80\x02\x8a\xff" + b"\x7f" * 255 + b".", "more than 64 bits"),
    "a million digits": (b"L" + b"9" * 1_000_000 + b"L\n.", "more than 32 characters"),
    "a number that is none": (b"I__import__('os')\n.", "a number that is none"),
    "a million lists, empty": (b"\x80\x02" + b"(" + b"]" * 1_000_000 + b"l.", "more memory than"),
    "half a million dicts": (b"\x80\x02" + b"(" + b"}" * 500_000 + b"l.", "more memory than"),
    "half a million sets": (b"\x80\x04(" + b"\x8f" * 500_000 + b"l.", "more memory than"),
    "an array of nothing, endless": (array(b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85", "U0", b"C\x00"), "U0"),
    "an array without its bytes": (array(b"J\xff\xff\xff\x7f\x85", "i8", b"C\x08" + b"\x00" * 8), "2,147,483,647 values"),
    "an array of negative size": (array(b"J\xff\xff\xff\xff\x85", "i8", b"C\x00"), "the shape of an array"),
    "an array of objects without its values": (array(b"J\xff\xff\xff\x7f\x85", "O8", b"]"), "with 0 values"),
    "a shape that is no tuple": (array(b"K\x01", "O8", b"](Ne"), "the shape of an array"),
    "no characters": (array(b"K\x01\x85", "U1", b"C\x04\xff\xff\xff\xff"), "no character"),
    # damage
    "an empty file": (b"", "ends in the middle"), "only a protocol": (b"\x80\x04", "ends in the middle"),
    "an end without a value": (b"\x80\x04.", "0 values"), "two values": (b"\x80\x04NN.", "2 values"),
    "an open mark": (b"\x80\x04N(N.", "1 open marks"), "more behind the end": (b"\x80\x04N.cos\nsystem\n", "follow the end"),
    "a protocol to come": (b"\x80\x09N.", "protocol 9"), "an opcode that is none": (b"\x80\x04\xff.", "opcode 0xff"),
    "a stack that is empty": (b"\x80\x04R.", "more values than there are|ends in the middle"),
    "no UTF-8": (b"\x80\x04\x8c\x02\xff\xfe.", "not UTF-8"), "half of a character": (b"V\\ud800\n.", "not UTF-8"),
    "a text of Python 2": (b"S'os.system'\n.", "opcode STRING"),
    "a program": (b"#!/bin/sh\ntouch canary\n", "opcode 0x23"),
}
ARRAYS: dict[str, tuple[bytes, str]] = {
    "objects that call": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n",
                              pickle.dumps(Calls(os.system, "touch canary"))), "names .*system"),
    "a header that calls": (npy("{'descr': __import__('os').system('touch canary'), 'fortran_order': False, 'shape': (1,)}"),
                            "a header"),
    "a header in headers": (npy("(" * 9000), "a header"),
    "a header of gigabytes": (b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", "a header that announces"),
    "a type with fields": (npy("{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }"), "a header"),
    "endless numbers": (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (999999999999,), }\n"), "with 0 bytes"),
    "endless nothing": (npy("{'descr': '<U0', 'fortran_order': False, 'shape': (999999999999,), }\n"), "U0"),
    "endless empty rows": (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (0, 999999999999), }\n"), "0 entries"),
    "a shape beyond numbers": (npy("{'descr': '<i8', 'fortran_order': False, 'shape': (" + "9" * 40 + ",), }\n"), "the shape"),
    "another version": (b"\x93NUMPY\x09\x00", "known version"), "nothing": (b"", "known version"),
    "an array of other length": (npy_bytes(np.array(["a"] * 9)), "entries"),
}


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder where anything that is run leaves a trace; checked at the end."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / f"{MODULE}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(modules))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "canary").exists() and MODULE not in sys.modules


def refused(path: Path, expected: str) -> None:
    before, started = set(sys.modules), time.process_time()  # of this process alone: the machine may be busy
    with pytest.raises(DataError, match=expected) as caught:
        read_released(path, 5)
    assert time.process_time() - started < 1, "refused too late"
    assert len(str(caught.value)) < 800 and caught.value.remedy
    assert {name.split(".")[0] for name in set(sys.modules) - before} <= {"encodings"}  # of Python's escapes in a line


def test_there_are_fifty_at_least():
    assert len(HOSTILE) + len(ARRAYS) >= 50


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_at_once_and_nothing_is_run(watched, case):
    content, expected = HOSTILE[case]
    path = watched / "dataset_preproc.p"
    path.write_bytes(content)
    refused(path, expected)


@pytest.mark.parametrize("case", ARRAYS)
def test_a_hostile_array_is_refused_at_once_and_nothing_is_run(watched, case):
    content, expected = ARRAYS[case]
    folder = write_arrays(watched / "arrays")
    (folder / "sys_target_texts.dev.npy").write_bytes(content)
    refused(folder, expected)


def test_what_is_hidden_in_a_sound_release_is_found(watched):
    split = case_split([], toy_inferences) | {"context": [], "target": [], "emotion": []}
    path = watched / "dataset_preproc.p"
    path.write_bytes(pickled([split, split, split | {"vads": [Calls(os.system, "touch canary")]}], 4))
    refused(path, r"byte \d+: it names '\w+\.system'")


@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling", "unreadable"])
def test_what_is_no_file_is_refused(watched, kind):
    path = watched / "dataset_preproc.p"
    if kind == "folder":
        (path / "dataset_preproc.p").mkdir(parents=True)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to("/proc/self/nothing")
    else:
        path.symlink_to("/proc/self/mem")  # a regular file that cannot be read from its start
    refused(path, "no such file|neither a file nor a folder|cannot be read")


def test_the_command_says_it_in_one_line(watched, capsys):
    path = watched / "f [red].p"
    path.write_bytes(HOSTILE["os.system"][0])
    assert cli.main(["import", str(path), "--check"]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and "f [red].p: byte" in said.err and "Nothing in it was run" in said.err
    assert words("ok") == ["ok"]
