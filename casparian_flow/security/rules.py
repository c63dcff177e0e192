"""The Gatekeeper's rules: what a plugin's source may not mention unless the policy allows it.

Every use of a module, name, attribute and so on is a mention, written `kind:what`, such as
`import:os`. References count, not only calls, so that an alias, decorator or metaclass hides
nothing. Names are compared in NFKC, as Python does. The rules are early feedback and no security
boundary (strings built at run time and libraries pass them); the sandbox is.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import deque
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from casparian_flow.errors import ConfigError
from casparian_flow.security.manifest import printable

if TYPE_CHECKING:
    from casparian_flow.config import GatekeeperSettings

RULESET = "1"
"""Version of the rules; changes when the result for some source may change."""

FINDINGS_LIMIT = 100
"""Findings reported for one source at most."""


class Finding(msgspec.Struct, frozen=True):
    """One mention that the policy forbids."""

    rule: str
    """A key of `KINDS`."""
    line: int
    what: str
    """The mention, printable, at most 60 characters."""
    instead: str
    """Advice: what to do instead."""

    @property
    def entry(self) -> str:
        """The mention as an entry of `[gatekeeper] allow` or `forbid`."""
        return f"{self.rule}:{self.what}"


class Policy(msgspec.Struct, frozen=True):
    """Exceptions from the rules (`allow`) and additions (`forbid`, which wins): `kind:what`."""

    allow: frozenset[str] = frozenset()
    forbid: frozenset[str] = frozenset()

    @classmethod
    def of(cls, settings: GatekeeperSettings) -> Policy:
        """The policy of the configuration.

        Raises:
            ConfigError: an entry is not of the form `kind:what` with a known kind.
        """
        for key, entries in (("allow", settings.allow), ("forbid", settings.forbid)):
            for entry in entries:
                kind, _, what = entry.partition(":")
                if kind not in KINDS or not what:
                    raise ConfigError(
                        f"[gatekeeper] {key} has {entry[:80]!r}, which is not of the form "
                        f"KIND:NAME; the kinds are {', '.join(KINDS)}",
                        f'write it like {key} = ["import:os", "name:getattr"]',
                    )
        return cls(frozenset(settings.allow), frozenset(settings.forbid))

    def refuses(self, rule: str, what: str) -> bool:
        """Whether the policy forbids this mention."""
        entry = f"{rule}:{what}"
        return entry in self.forbid or (entry not in self.allow and _refused(rule, what))


class _Mention(NamedTuple):
    rule: str
    what: str
    line: int


def judge(tree: ast.Module, policy: Policy) -> list[Finding]:
    """The forbidden mentions in a source, sorted by line; at most `FINDINGS_LIMIT`."""
    refused = sorted(
        {mention for mention in _mentions(tree) if policy.refuses(mention.rule, mention.what)},
        key=lambda mention: (mention.line, mention.rule, mention.what),
    )
    return [
        Finding(rule, line, printable(what), _instead(f"{rule}:{what}", policy))
        for rule, what, line in refused[:FINDINGS_LIMIT]
    ]


def _mentions(tree: ast.Module) -> Iterator[_Mention]:
    for node in _walk(tree):
        line = getattr(node, "lineno", 1)
        for rule, what in _uses(node):
            yield _Mention(rule, what, line)
        for name in _identifiers(node):
            if _DUNDER.fullmatch(name):
                yield _Mention("dunder", name, line)


def _uses(node: ast.AST) -> Iterator[tuple[str, str]]:
    """The mentions of a node itself, without dunders in identifiers: (kind, what)."""
    match node:
        case ast.Name(id=name, ctx=ast.Load()):
            yield "name", name
        case ast.Attribute(attr=name):
            yield "attribute", name
        case ast.MatchClass(kwd_attrs=names):
            yield from (("attribute", name) for name in names)
        case ast.keyword(arg=str(name), value=value) if not _is_false(value):
            yield "keyword", name
        case ast.Constant(value=str(text)):
            yield from (("string", word) for word in _DUNDER.findall(text))
        case ast.Constant(value=bytes(data)):
            yield from (("string", word) for word in _DUNDER.findall(data.decode("latin-1")))
        case ast.Import(names=aliases):
            for alias in aliases:
                yield from _imported(alias.name)
        case ast.ImportFrom(level=0, module=str(module), names=aliases):
            for alias in aliases:
                yield from _imported(f"{module}.{alias.name}")
        case ast.ImportFrom(level=level, module=module):
            yield "import", "." * level + (module or "")


def _walk(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node, parents first, without recursion and without docstrings.

    A docstring is any constant that is a statement; its value is unused, except as `__doc__`.
    """
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            yield node
            waiting.extend(ast.iter_child_nodes(node))


def _identifiers(node: ast.AST) -> Iterator[str]:
    """All names in a node's own fields."""
    if isinstance(node, ast.Constant):
        return
    for field in node._fields:
        value = getattr(node, field, None)
        if isinstance(value, str):
            yield from value.split(".")
        elif isinstance(value, list):
            yield from (name for name in value if isinstance(name, str))


def _imported(dotted: str) -> Iterator[tuple[str, str]]:
    """A module, the packages that contain it, and its parts as attributes."""
    first, *inner = dotted.split(".")
    for name in accumulate([first, *inner], "{}.{}".format):
        yield "import", name
    for name in inner:
        yield "attribute", name


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def _refused(rule: str, what: str) -> bool:
    """Whether the rules, without a policy, forbid it."""
    match rule:
        case "import":
            standard = what in sys.stdlib_module_names or what in GONE
            return (
                what.startswith(".")
                or what.endswith(".*")
                or what in UNWANTED_SUBMODULES
                or (standard and what not in STANDARD)
            )
        case "name":
            return what in NAMES
        case "attribute":
            return what in ATTRIBUTES or what.lstrip("_") in MODULES
        case "keyword":
            return what in KEYWORDS
        case _:
            return what not in HARMLESS_DUNDERS


def _instead(entry: str, policy: Policy) -> str:
    if entry in policy.forbid:
        return "the configuration forbids it: [gatekeeper] forbid"
    if entry.startswith("import:."):
        return "a plugin is one file: put the code into it, or into a package it depends on"
    if entry.endswith(".*"):
        return "import the names you use, one by one"
    return INSTEAD.get(entry) or KINDS[entry.partition(":")[0]]


def _names_in(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DUNDER = re.compile(r"__[^\W_]\w*?__")

KINDS = {
    "import": "docs/security.md lists the modules that a plugin may import",
    "name": "write out what it does; give your own variable another name",
    "attribute": 'use what the plugin imports itself; write a column of that name as row["..."]',
    "keyword": "leave it out, and store such data as Parquet or Arrow",
    "dunder": "use the public function or operator for it",
    "string": "leave it out of the text, or write it in a comment or docstring",
}
"""Kind of mention -> advice, where `INSTEAD` has none for the mention."""

INSTEAD = {
    "import:os": "for a name's parts use pathlib.PurePath, for the bytes open(file_path)",
    "import:sys": "for messages use print or logging, for the byte order int.from_bytes",
    "import:subprocess": "a plugin starts no process: use a package that reads the format",
    "import:multiprocessing": "files run in parallel by themselves; threads are allowed",
    "import:pickle": "it runs code from data: store such data as Parquet, Arrow or JSON",
    "import:shutil": "copy with open and read; archives open with zipfile or tarfile",
    "import:glob": "a plugin sees only its one file; put the pattern into MANIFEST",
    "import:inspect": "name what you use directly",
    "import:gc": "read the file in pieces and publish each",
    "import:casparian_flow.engine": "a plugin needs casparian_flow.sdk only",
    "name:eval": "for literals use ast.literal_eval or json.loads",
    "name:getattr": "write the attribute itself, or keep the choices in a dict",
    "name:setattr": "write the assignment itself, or keep the values in a dict",
    "name:compile": "for patterns write re.compile",
    "name:input": "a plugin has no terminal: use open(file_path)",
    "name:breakpoint": "use print; `casparian jobs show ID` has what a job printed",
    "attribute:eval": 'compute with columns: table["a"] + table["b"]',
    "attribute:attrgetter": "write lambda row: row.name",
    "attribute:methodcaller": "write lambda row: row.method()",
    "dunder:__class__": "use type(value), or isinstance",
    "dunder:__dict__": "use dataclasses.asdict, or vars of your own in a dict",
    "dunder:__del__": "use with, or try and finally",
    "dunder:__import__": "import it at the top of the file",
    "dunder:__file__": "a plugin is one file without others beside it: put the data into it",
}
"""Mention -> advice, for common mistakes."""

STANDARD = _names_in("""
    __future__ abc array ast base64 bisect binascii bz2 calendar cmath codecs collections colorsys
    compression concurrent configparser contextlib contextvars copy csv dataclasses datetime
    decimal difflib email encodings enum errno fnmatch fractions functools graphlib gzip hashlib
    heapq hmac html io ipaddress itertools json locale logging lzma mailbox math mimetypes mmap
    numbers operator pathlib plistlib pprint queue quopri random re reprlib secrets shlex sqlite3
    stat statistics string stringprep struct tarfile tempfile textwrap threading time tomllib
    traceback types typing unicodedata urllib uuid warnings wave weakref xml zipfile zlib zoneinfo
    casparian_flow
""")
"""Modules of the standard library that a plugin may import, and `casparian_flow`."""

UNWANTED_SUBMODULES = _names_in("""
    casparian_flow.engine casparian_flow.security concurrent.futures.process
    concurrent.interpreters logging.config logging.handlers urllib.request urllib.response
    urllib.robotparser
""")

GONE = _names_in("""
    aifc asynchat asyncore audioop binhex cgi cgitb chunk crypt distutils imghdr imp lib2to3 mailcap
    msilib nis nntplib ossaudiodev pipes smtpd sndhdr spwd sunau telnetlib uu xdrlib
""")
"""Modules that only some supported Python versions have, so that all give the same result."""

NAMES = _names_in("""
    breakpoint compile delattr eval exec getattr globals help input locals setattr vars
""")
"""Built-in functions that turn text into code or names, or wait for input."""

MODULES = _names_in("""
    builtins cffi cloudpickle ctypes ctypeslib gc importlib inspect marshal multiprocessing os
    pickle posix runpy shutil socket subprocess sys
""")
"""Modules that other modules have as an attribute, such as `logging.os` or `random._os`."""

ATTRIBUTES = _names_in("""
    ag_code ag_frame cr_code cr_frame f_back f_builtins f_code f_globals f_locals gi_code gi_frame
    tb_frame tb_next modules mro _getframe _current_frames currentframe walk_stack walk_tb
    get_objects get_referents get_referrers
    CodeType FunctionType LambdaType CDLL PyDLL cdll pydll dlopen pythonapi foreign_buffer
    eval exec execfile runcode runctx runsource runstring rundocs run_module run_path _create_fn
    attrgetter methodcaller get_field get_type_hints ForwardRef _eval_type resolve_name
    import_module load_module exec_module import_optional_dependency module_from_spec
    spec_from_file_location BaseConfigurator DictConfigurator dictConfig fileConfig
    Pickler Unpickler read_pickle to_pickle unsafe_load tofile FileIO open_code
    enable_load_extension load_extension getnode set_trace post_mortem setprofile settrace
""")
"""Attributes that reach frames, native code or code in text, or bypass `open`."""

KEYWORDS = _names_in("allow_pickle eval_str")
"""Keyword arguments that run code from data, unless they are False."""

HARMLESS_DUNDERS = _names_in("""
    __future__ __main__ __name__ __qualname__ __all__ __author__ __version__ __slots__
    __init__ __new__ __post_init__ __init_subclass__ __call__ __enter__ __exit__ __aenter__
    __aexit__ __iter__ __next__ __aiter__ __anext__ __await__ __len__ __length_hint__ __contains__
    __getitem__ __setitem__ __delitem__ __missing__ __reversed__ __repr__ __str__ __bytes__
    __format__ __hash__ __bool__ __int__ __float__ __complex__ __index__ __round__ __fspath__
    __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__
    __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __floordiv__ __rfloordiv__ __mod__ __rmod__
    __divmod__ __pow__ __lshift__ __rshift__ __and__ __rand__ __iand__ __or__ __ror__ __ior__
    __xor__ __neg__ __pos__ __abs__ __invert__ __matmul__ __copy__ __deepcopy__
    __arrow_c_stream__ __arrow_c_array__ __arrow_c_schema__
""")
"""Harmless protocols; all other dunder names are refused."""
