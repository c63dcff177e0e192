"""Hostile plugins, as data: what the Gatekeeper must find, and the sandbox must make harmless.

Each is a whole plugin. Its input file holds the path of a secret file; it publishes to topic `t`
one row, whose column `harm` says whether the attack reached what it must not: opened the secret,
started a process, or saw the variable HOSTPW of the host's environment. An exception is no harm.
"""

from __future__ import annotations

import textwrap
from typing import NamedTuple


class Attack(NamedTuple):
    """One way out, with the finding that the Gatekeeper must have among its own."""

    row: int
    """Row of the acceptance corpus; variants share theirs."""
    name: str
    body: str
    """Body of `attack(secret: str) -> bool`."""
    rule: str
    what: str
    at: str
    """Text on the line of the finding; nothing else of the plugin has it."""
    encoding: str = "utf-8"

    @property
    def id(self) -> str:
        return f"{self.row}-{self.name}"

    @property
    def source(self) -> bytes:
        """The plugin's file."""
        body = textwrap.indent(textwrap.dedent(self.body).strip("\n"), "    ")
        return (f"# coding: {self.encoding}\n" + PLUGIN.replace("    BODY", body)).encode()

    @property
    def line(self) -> int:
        """The line of the finding, from 1."""
        lines = self.source.decode().splitlines()
        return next(number for number, line in enumerate(lines, 1) if self.at in line)


PLUGIN = """\
import io
import json
import logging
import operator
import functools
import string
import typing

import numpy as np
import pandas as pd
import pyarrow as pa

from casparian_flow.sdk import BasePlugin, PluginMetadata

MANIFEST = PluginMetadata(pattern="*", topic="t")


def attack(secret: str) -> bool:
    BODY


class Handler(BasePlugin):
    def execute(self, file_path: str) -> None:
        with open(file_path) as file:
            secret = file.read().strip()
        try:
            harm = attack(secret)
        except BaseException as error:
            print(repr(error))
            harm = False
        self.publish("t", pa.table({"harm": [harm]}))
"""

S_ROWS = [
    Attack(
        1,
        "import",
        """
        import os
        return os.open(secret, os.O_RDONLY) >= 0
        """,
        "import",
        "os",
        "import os",
    ),
    Attack(
        1,
        "from-import",
        """
        from os import getpid as g, open as o
        return g() > 0 and o(secret, 0) >= 0
        """,
        "import",
        "os",
        "from os",
    ),
    Attack(
        2,
        "import-function",
        "return __import__('o'+'s').open(secret, 0) >= 0",
        "dunder",
        "__import__",
        "__import__",
    ),
    Attack(
        3,
        "import-module",
        """
        import importlib
        return importlib.import_module('os').open(secret, 0) >= 0
        """,
        "import",
        "importlib",
        "import importlib",
    ),
    Attack(
        3,
        "getattr-import",
        """
        import importlib
        return getattr(importlib,'__imp'+'ort__')('os').open(secret, 0) >= 0
        """,
        "name",
        "getattr",
        "getattr(",
    ),
    Attack(
        4,
        "globals",
        "return bool(globals()['__buil'+'tins__']['op'+'en'](secret).read())",
        "name",
        "globals",
        "globals()",
    ),
    Attack(
        5,
        "eval",
        'return bool(eval("op" + "en(secret).read()"))',
        "name",
        "eval",
        "eval(",
    ),
    Attack(
        5,
        "alias",
        """
        found = []
        e=exec; e("found.append(open(secret).read())")
        return bool(found)
        """,
        "name",
        "exec",
        "e=exec",
    ),
    Attack(
        5,
        "timeit",
        """
        import timeit
        found = []
        things = {"found": found, "secret": secret}
        timeit.timeit("found.append(open(secret).read())", number=1, globals=things)
        return bool(found)
        """,
        "import",
        "timeit",
        "import timeit",
    ),
    Attack(
        5,
        "interpreter",
        """
        import code
        found = []
        inner = code.InteractiveInterpreter({"found": found, "secret": secret})
        inner.runsource("found.append(open(secret).read())")
        return bool(found)
        """,
        "import",
        "code",
        "import code",
    ),
    Attack(
        6,
        "function-of-code",
        """
        src = "open(%r).close()" % secret
        type(lambda:0)(compile(src,'x','exec'),globals())()
        return True
        """,
        "name",
        "compile",
        "compile(src",
    ),
    Attack(
        7,
        "subclasses",
        """
        for cls in ().__class__.__base__.__subclasses__():
            if cls.__name__ == "BuiltinImporter":
                return cls.load_module('posix').open(secret, 0) >= 0
        return False
        """,
        "dunder",
        "__subclasses__",
        "__base__",
    ),
    Attack(
        8,
        "format",
        """
        obj = logging.Formatter()
        return "HOSTPW" in '{0.__init__.__globals__[os].environ}'.format(obj)
        """,
        "string",
        "__globals__",
        "{0.",
    ),
    Attack(
        9,
        "re-export",
        "return bool(json.codecs.builtins.open(secret).read())",
        "attribute",
        "builtins",
        "json.codecs",
    ),
    Attack(
        10, "logging-os", "return logging.os.open(secret, 0) >= 0", "attribute", "os", "os.open"
    ),
    Attack(
        10,
        "pandas-os",
        "return pd.io.common.os.open(secret, 0) >= 0",
        "attribute",
        "os",
        "common.os",
    ),
    Attack(
        10,
        "sys-modules",
        "return logging.sys.modules['os'].open(secret, 0) >= 0",
        "attribute",
        "sys",
        "logging.sys",
    ),
    Attack(
        11,
        "native",
        "return np.ctypeslib.ctypes.CDLL(None).system(b'id') == 0",
        "attribute",
        "ctypeslib",
        "ctypeslib",
    ),
    Attack(
        12,
        "decorator",
        """
        found = []
        src = "found.append(open(secret).read())"
        @exec
        @(lambda f: src)
        def unused():
            pass
        return bool(found)
        """,
        "name",
        "exec",
        "@exec",
    ),
    Attack(
        12,
        "metaclass",
        """
        class Meta(type):
            def __getitem__(cls, text):
                return eval(text, {"secret": secret})
        class Reader(metaclass=Meta):
            pass
        return bool(Reader["open(secret).read()"])
        """,
        "name",
        "eval",
        "eval(",
    ),
    Attack(
        13,
        "letters",
        """
        import \N{MATHEMATICAL SANS-SERIF SMALL O}\N{MATHEMATICAL SANS-SERIF SMALL S} as g
        return g.open(secret, 0) >= 0
        """,
        "import",
        "os",
        " as g",
    ),
    Attack(
        13,
        "letters-dunder",
        "return __\N{MATHEMATICAL SCRIPT SMALL I}mport__('os').open(secret, 0) >= 0",
        "dunder",
        "__import__",
        "mport__(",
    ),
    Attack(
        15,
        "pickle",
        """
        import pickle
        payload = b'cio\\nopen\\n(V' + secret.encode() + b'\\ntR.'
        return bool(pickle.loads(payload).read())
        """,
        "import",
        "pickle",
        "import pickle",
    ),
    Attack(
        15,
        "read-pickle",
        """
        payload = b'cio\\nopen\\n(V' + secret.encode() + b'\\ntR.'
        return bool(pd.read_pickle(io.BytesIO(payload)).read())
        """,
        "attribute",
        "read_pickle",
        "read_pickle",
    ),
    Attack(
        15,
        "allow-pickle",
        """
        payload = b'cio\\nopen\\n(V' + secret.encode() + b'\\ntR.'
        return bool(np.load(io.BytesIO(payload), allow_pickle=True).read())
        """,
        "keyword",
        "allow_pickle",
        "allow_pickle",
    ),
    Attack(
        16,
        "frame-eval",
        """
        text = '@pd.io.common.os.open(@secret, 0)'
        return pd.DataFrame({"a": [1]}).eval(text, engine='python') >= 0
        """,
        "attribute",
        "eval",
        "eval(text",
    ),
    Attack(
        17,
        "attrgetter",
        "return operator.attrgetter('os.open')(logging)(secret, 0) >= 0",
        "attribute",
        "attrgetter",
        "attrgetter",
    ),
    Attack(
        17,
        "reduce-getattr",
        "return functools.reduce(getattr,['os', 'open'], logging)(secret, 0) >= 0",
        "name",
        "getattr",
        "getattr",
    ),
    Attack(
        18,
        "match",
        """
        match logging:
            case object(os=o):
                return o.open(secret, 0) >= 0
        return False
        """,
        "attribute",
        "os",
        "object(os=o)",
    ),
    Attack(
        19,
        "traceback",
        """
        try:
            raise ValueError
        except ValueError as error:
            found = error.__traceback__.tb_frame.f_globals["__buil" + "tins__"]
        return bool(found["open"](secret).read())
        """,
        "attribute",
        "tb_frame",
        "tb_frame",
    ),
    Attack(
        19,
        "generator",
        """
        def frames():
            yield generator.gi_frame.f_back
        generator = frames()
        return bool(next(generator).f_builtins["open"](secret).read())
        """,
        "attribute",
        "gi_frame",
        "gi_frame",
    ),
    Attack(
        20,
        "gc",
        """
        import gc
        for found in gc.get_objects():
            if type(found) is dict and found.get("__name__") == "os":
                return found["open"](secret, 0) >= 0
        return False
        """,
        "import",
        "gc",
        "import gc",
    ),
    Attack(
        20,
        "inspect",
        """
        import inspect
        return inspect.sys.modules["os"].open(secret, 0) >= 0
        """,
        "import",
        "inspect",
        "import inspect",
    ),
    Attack(
        21,
        "python-api",
        """
        import ctypes
        src = "open(%r).close()" % secret
        return ctypes.pythonapi.PyRun_SimpleString(src.encode()) == 0
        """,
        "attribute",
        "pythonapi",
        "pythonapi",
    ),
    Attack(
        22,
        "del",
        """
        found = []
        type('X',(),{'__del__': lambda self: found.append(open(secret).read())})()
        return bool(found)
        """,
        "string",
        "__del__",
        "__del__",
    ),
    Attack(
        22,
        "poisoned-builtin",
        """
        import builtins
        found = []
        kept = builtins.len
        builtins.len = lambda value: found.append(open(secret).read())
        len("")
        builtins.len = kept
        return bool(found)
        """,
        "import",
        "builtins",
        "import builtins",
    ),
    Attack(
        23,
        "formatter-field",
        """
        found = string.Formatter().get_field('0.os.open',(logging,),{})[0]
        return found(secret, 0) >= 0
        """,
        "attribute",
        "get_field",
        "get_field",
    ),
    Attack(
        24,
        "type-hints",
        """
        class Hinted:
            x: 'open(%r).read() and int' % secret
        return typing.get_type_hints(Hinted)["x"] is int
        """,
        "attribute",
        "get_type_hints",
        "get_type_hints",
    ),
    Attack(
        25,
        "runstring",
        """
        np.testing.runstring("open(%r).close()" % secret, {})
        return True
        """,
        "attribute",
        "runstring",
        "runstring",
    ),
    Attack(
        25,
        "resolve",
        """
        import logging.config
        found = logging.config.BaseConfigurator({}).resolve('os.open')
        return found(secret, 0) >= 0
        """,
        "import",
        "logging.config",
        "import logging.config",
    ),
    Attack(
        26,
        "file-io",
        "return bool(io.FileIO(secret).read())",
        "attribute",
        "FileIO",
        "FileIO",
    ),
]
"""The S rows whose finding has a line, and what is known of rows 23 to 26."""

UTF7 = Attack(
    14,
    "utf-7",
    """
    # none +AAoAIAAgACAAIA-return bool(open(secret).read())
    return False
    """,
    "encoding",
    "utf-7",
    "coding",
    "utf-7",
)
"""Refused before there is a syntax tree: the comment is code to Python, which reads UTF-7."""

ATTACKS = [*S_ROWS, UTF7]
