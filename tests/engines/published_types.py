"""Holds bodies and Bicep resources to the types that Microsoft publishes.

The types are generated from the API descriptions (bicep-types-az, MIT); they are not in
this repository: tests that need them look beside it and skip without them. What they
cannot see: `properties.jobs`, `settings` and `componentSpec` are any(); actions (POST),
lists, the run history and blobs are not in them at all.
"""

import functools
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "shared" / "azure_types"
REQUIRED, READ_ONLY, WRITE_ONLY = 1, 2, 4
IN_THE_ADDRESS = ("id", "type", "apiVersion", "name")
ANY = object()  # an expression of Bicep whose value is not known here
PRIMITIVE = {"StringType": str, "BooleanType": bool, "IntegerType": int}
ML = "Microsoft.MachineLearningServices/workspaces"

needed = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="the published types are not beside the repository"
)


@functools.cache
def _index():
    found = json.loads((FOLDER / "index.json").read_text())
    return {name.lower(): FOLDER / file for name, file in found.items()}


@functools.cache
def _types(path):
    return json.loads(path.read_text())


def is_published(resource):
    return resource.lower() in _index()


class Checker:
    """Problems of one body; `resource` is "Provider/type@version".

    answered: a body that came from Azure may have what is read-only, and lack what is
    write-only.
    """

    def __init__(self, resource, *, answered=False):
        self.types = _types(_index()[resource.lower()])
        self.answered, self.problems = answered, []
        self.root = next(
            self.of(t["body"])
            for t in self.types
            if t["$type"] == "ResourceType" and t["name"].lower() == resource.lower()
        )

    def of(self, reference):
        return self.types[int(reference["$ref"].rpartition("/")[2])]

    def check(self, body):
        self.walk(self.root, body, "$")
        return self.problems

    def say(self, where, what):
        self.problems.append(f"{where}: {what}")

    def walk(self, kind, value, where):
        name = kind["$type"]
        if name == "AnyType" or value is None or value is ANY:
            return
        if name == "UnionType":
            self.union(kind, value, where)
        elif name == "StringLiteralType":
            if value != kind["value"]:
                self.say(where, f"{value!r} is not {kind['value']!r}")
        elif name == "ArrayType":
            if not isinstance(value, list):
                self.say(where, "not an array")
            for index, item in enumerate(value if isinstance(value, list) else ()):
                self.walk(self.of(kind["itemType"]), item, f"{where}[{index}]")
        elif name in ("ObjectType", "DiscriminatedObjectType"):
            self.object(kind, value, where)
        else:
            self.primitive(kind, value, where)

    def union(self, kind, value, where):
        options = [self.of(e) for e in kind["elements"]]
        literals = [o["value"] for o in options if o["$type"] == "StringLiteralType"]
        if literals and isinstance(value, str):  # an open one, too: published values
            options = [o for o in options if o["$type"] == "StringLiteralType"]
        kept = len(self.problems)
        for option in options:
            self.walk(option, value, where)
            if len(self.problems) == kept:
                return
            del self.problems[kept:]
        self.say(where, f"{value!r:.80} is none of {literals or len(options)}")

    def object(self, kind, value, where):
        if not isinstance(value, dict):
            return self.say(where, f"{value!r:.60} is not an object")
        known = dict(kind.get("properties") or kind.get("baseProperties") or {})
        more = kind.get("additionalProperties")
        if kind["$type"] == "DiscriminatedObjectType":
            tag = value.get(kind["discriminator"])
            if tag is ANY:
                return None
            if tag not in kind["elements"]:
                what = f"{kind['discriminator']} is {tag!r}"
                return self.say(where, f"{what}, not one of {sorted(kind['elements'])}")
            inner = self.of(kind["elements"][tag])
            known |= inner.get("properties", {})
            more = more or inner.get("additionalProperties")
        skip = IN_THE_ADDRESS if where == "$" else ()
        for name in known.keys() - skip:
            self.property(known[name], value.get(name), f"{where}.{name}")
        for name in value.keys() - known.keys() - set(skip):
            if more:
                self.walk(self.of(more), value[name], f"{where}.{name}")
            else:
                self.say(f"{where}.{name}", "unknown property")
        return None

    def property(self, known, value, where):
        flags = known["flags"]
        if value is None:
            if flags & REQUIRED and not (self.answered and flags & WRITE_ONLY):
                self.say(where, "required, missing")
            return
        if flags & READ_ONLY and not self.answered:
            self.say(where, "read-only, set")
        if flags & WRITE_ONLY and self.answered:
            self.say(where, "write-only, answered")
        self.walk(self.of(known["type"]), value, where)

    def primitive(self, kind, value, where):
        want = PRIMITIVE.get(kind["$type"])
        if want and type(value) is not want:
            return self.say(where, f"{value!r:.60} is not a {want.__name__}")
        if want is str:
            low, high = kind.get("minLength", 0), kind.get("maxLength", 1 << 60)
            if not low <= len(value) <= high:
                self.say(where, f"length {len(value)} is not {low} to {high}")
            if kind.get("pattern") and not re.search(kind["pattern"], value):
                self.say(where, f"{value!r:.60} does not match {kind['pattern']}")
        if want is int:
            low, high = kind.get("minValue", value), kind.get("maxValue", value)
            if not low <= value <= high:
                self.say(where, f"{value} is not {low} to {high}")
        return None


def check(resource, body, *, answered=False):
    """What is wrong with a body, as texts."""
    return Checker(resource, answered=answered).check(body)


def resource_of(path, version):
    """The type of the resource at an address of the workspace; None if it has none."""
    found = re.search(rf"/providers/{re.escape(ML)}/[^/]+(/.*)?$", path)
    parts = (found[1] or "").strip("/").split("/") if found and found[1] else []
    if not found or path.startswith(("/history", "/data")) or len(parts) % 2:
        return None
    return "/".join([ML, *parts[::2]]) + f"@{version}"


# ---- Bicep: objects, arrays, texts, numbers, both branches of a choice; all other
# expressions may be anything.

TOKEN = re.compile(
    r"(?P<skip>[ \t\r]+|//[^\n]*|/\*.*?\*/)|(?P<line>\n)|(?P<text>'(?:[^'\\\n]|\\.)*')"
    r"|(?P<number>\d+)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<sign>==|!=|<=|>=|&&|\|\||=~|\?\?|\.\?|[{}\[\]():,.?!=<>+\-*/%@|])",
    re.DOTALL,
)
BETWEEN = ("==", "!=", "<=", ">=", "&&", "||", "=~", "<", ">", "+", "-", "*", "/", "%")


def resources(path):
    """(name, type, line, bodies) of the resources of a file that it declares itself;
    one body for each way that its choices can go."""
    text = path.read_text()
    head = r"(?m)^resource (\w+) '([^']+)'( existing)? ="
    for found in re.finditer(head, text):
        if found[3]:
            continue
        reader = _Reader(text[found.end() :])
        reader.skip_condition()
        body = reader.value()
        body = body[0] if isinstance(body, list) else body  # a loop
        line = text[: found.start()].count("\n") + 1
        yield found[1], found[2], line, _ways(body)


def _ways(value):
    if isinstance(value, tuple):
        return [way for option in value for way in _ways(option)]
    if isinstance(value, dict):
        ways = [{}]
        for key, inner in value.items():
            ways = [w | {key: v} for w in ways for v in _ways(inner)]
        return ways
    if isinstance(value, list):
        ways = [[]]
        for inner in value:
            ways = [[*w, v] for w in ways for v in _ways(inner)]
        return ways
    return [value]


class _Reader:
    def __init__(self, text):
        found = (
            (m.lastgroup, m[0]) for m in TOKEN.finditer(text) if m.lastgroup != "skip"
        )
        self.tokens, self.at = [*found, ("end", "")], 0

    def next(self):
        self.at += 1
        return self.tokens[self.at - 1]

    def sees(self, *signs):
        kind, text = self.tokens[self.at]
        return kind == "sign" and text in signs

    def lines(self):
        while self.tokens[self.at][0] == "line" or self.sees(","):
            self.at += 1

    def skip_condition(self):
        if self.tokens[self.at] != ("name", "if"):
            return
        self.at, depth = self.at + 2, 1
        while depth:
            text = self.next()[1]
            depth += (text == "(") - (text == ")")

    def value(self):
        found = self.primary()
        while self.sees(*BETWEEN):
            self.next()
            self.lines()
            self.primary()
            found = ANY
        if self.sees("?"):
            self.next()
            self.lines()
            yes = self.value()
            self.lines()
            assert self.next()[1] == ":"
            self.lines()
            return (yes, self.value())
        return found

    def primary(self):
        kind, text = self.next()
        found = ANY
        if text == "{":
            found = self.object()
        elif text == "[":
            found = self.array()
        elif text == "(":
            found = self.value()
            self.next()
        elif text in ("!", "-"):
            self.primary()
        elif kind == "text" and "${" not in text:
            found = re.sub(r"\\(.)", r"\1", text[1:-1])
        elif kind == "number":
            found = int(text)
        elif kind == "name":
            found = {"true": True, "false": False, "null": None}.get(text, ANY)
        while self.sees(".", "(", "[", ".?"):
            sign, found = self.next()[1], ANY
            if sign in (".", ".?"):
                self.next()
                continue
            self.lines()
            while not self.sees(")", "]"):
                self.value()
                self.lines()
            self.next()
        return found

    def object(self):
        found = {}
        self.lines()
        while not self.sees("}"):
            kind, key = self.next()
            key = "any" if kind == "text" and "${" in key else key.strip("'")
            assert self.next()[1] == ":", key
            self.lines()
            found[key] = self.value()
            self.lines()
        self.next()
        return found

    def array(self):
        self.lines()
        found = []
        if self.tokens[self.at] == ("name", "for"):
            while not self.sees(":"):
                self.next()
            self.next()
        self.lines()
        while not self.sees("]"):
            found.append(self.value())
            self.lines()
        self.next()
        return found
