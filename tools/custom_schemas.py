"""Strict JSON schemas of custom resources, made from their definitions, for the tests of the Kubernetes manifests.

    python tools/custom_schemas.py --out tests/k8s/schemas DEFINITION.yaml...

A definition is a CustomResourceDefinition as its project publishes it. Descriptions are left out, and rules in CEL,
which no JSON schema has; where the definition does not say that unknown fields are kept they are forbidden.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

KEPT = {
    *("type", "enum", "format", "pattern", "required", "minimum", "maximum", "minLength", "maxLength"),
    *("minItems", "maxItems", "minProperties", "maxProperties", "oneOf", "anyOf", "allOf", "not"),
}
ENVELOPE = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
INT_OR_STRING = {"anyOf": [{"type": "integer"}, {"type": "string"}]}


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """`schema` of OpenAPI as one of JSON, with nothing but what can be checked."""
    if schema.get("x-kubernetes-int-or-string"):
        return INT_OR_STRING
    result = {key: schema[key] for key in KEPT & schema.keys()}
    if "properties" in schema:
        result["properties"] = {name: strict(each) for name, each in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    elif isinstance(schema.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(schema["additionalProperties"])
    if "items" in schema:
        result["items"] = strict(schema["items"])
    if schema.get("nullable"):
        result["type"] = [schema["type"], "null"]
    return result


def schemas(definition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The schema of each version that is served, by `KIND_GROUP_VERSION` in small letters."""
    spec = definition["spec"]
    found = {}
    for version in spec["versions"]:
        if version["served"]:
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"] |= ENVELOPE
            schema["required"] = sorted({*schema.get("required", ()), *ENVELOPE})
            found[f"{spec['names']['kind']}_{spec['group']}_{version['name']}".lower()] = schema
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("definitions", nargs="+", type=Path, metavar="DEFINITION.yaml")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    options = parser.parse_args()
    for path in options.definitions:
        for name, schema in schemas(yaml.safe_load(path.read_text(encoding="utf-8"))).items():
            text = json.dumps(schema, separators=(",", ":"), sort_keys=True)
            (options.out / f"{name}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
