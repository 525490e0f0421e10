"""Alerts, dashboard and scalers: their queries parse, their metrics exist, and alerts fire when they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from tests.k8s.rendering import ROOT, Manifest, find, rendered

METRICS = ROOT / "docs/metrics.md"
"""Its tables are what a scrape gives, which another test holds."""
GUIDE = ROOT / "docs/kubernetes.md"
ALERTS = Path(__file__).with_name("alerts.yaml")
OF_PROMETHEUS = {"up"}
TARGET_LABELS = {"namespace", "pod", "job"}
"""What the operator's Prometheus adds to every series."""
INTERVAL = "1m"


def documented() -> dict[str, set[str]]:
    """Labels of each series by its name."""
    found: dict[str, set[str]] = {}
    for line in METRICS.read_text().splitlines():
        if line.startswith("| `"):
            name, kind, labels = (each.strip() for each in line.split("|")[1:4])
            suffixes = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
            for suffix in suffixes:
                found[name.strip("`") + suffix] = set(re.findall(r"`(\w+)`", labels)) | (
                    {"le"} if suffix == "_bucket" else set()
                )
    return found


def selectors(query: str) -> Iterator[promql_parser.VectorSelector]:
    """The series that a query asks for.

    Raises:
        ValueError: it is no PromQL.
    """
    yield from _selectors(promql_parser.parse(query))


def _selectors(expression: Any) -> Iterator[promql_parser.VectorSelector]:
    match expression:
        case promql_parser.VectorSelector():
            yield expression
        case promql_parser.MatrixSelector():
            yield expression.vector_selector
        case promql_parser.BinaryExpr():
            yield from _selectors(expression.lhs)
            yield from _selectors(expression.rhs)
        case promql_parser.Call():
            for argument in expression.args:
                yield from _selectors(argument)
        case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.SubqueryExpr():
            yield from _selectors(expression.expr)
        case promql_parser.NumberLiteral() | promql_parser.StringLiteral():
            return
        case _:
            raise TypeError(f"no case for {type(expression).__name__}")


def faults(query: str) -> list[str]:
    """Metrics that no server has, and labels that no such metric has."""
    known, found = documented(), []
    for selector in selectors(query):
        if selector.name in OF_PROMETHEUS:
            continue
        if selector.name not in known:
            found.append(f"no metric {selector.name}")
            continue
        labels = {matcher.name for matcher in selector.matchers.matchers}
        found += [
            f"{selector.name} has no label {each}" for each in sorted(labels - known[selector.name] - TARGET_LABELS)
        ]
    return found


def dashboard() -> Any:
    return json.loads(find(rendered("metrics"), "ConfigMap", "hsrpc-dashboard")["data"]["hsrpc.json"])


def panels() -> list[Manifest]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def rules() -> list[Manifest]:
    [group] = find(rendered("metrics"), "PrometheusRule")["spec"]["groups"]
    return group["rules"]


def queries() -> Iterator[str]:
    for panel in panels():
        for target in panel["targets"]:
            yield target["expr"].replace("$__rate_interval", INTERVAL)
    for rule in rules():
        yield rule["expr"]
    [trigger] = find(rendered("keda"), "ScaledObject")["spec"]["triggers"]
    yield trigger["metadata"]["query"]


def test_queries_ask_for_what_there_is():
    """Those of the dashboard, of the alerts and of the scaler."""
    asked = list(queries())
    assert len(asked) > 30
    assert [fault for query in asked for fault in faults(query)] == []


@pytest.mark.parametrize(
    ("query", "fault"),
    [
        ("rate(hsrpc_tokens_total[1m])", "no metric hsrpc_tokens_total"),
        ("sum by (le) (rate(hsrpc_step_duration_seconds[1m])) > 1", "no metric hsrpc_step_duration_seconds"),
        ('1 - hsrpc_cache_blocks{level="host"}', "hsrpc_cache_blocks has no label level"),
    ],
)
def test_what_there_is_not_is_seen(query, fault):
    """Names, histograms without a suffix, labels."""
    assert faults(query) == [fault]


def test_the_autoscaler_s_and_the_picker_s_metrics_exist():
    """By the names that an adapter, or the picker itself, reads; there is one series of each, however many GPUs are."""
    [metric] = find(rendered("hpa"), "HorizontalPodAutoscaler")["spec"]["metrics"]
    [config] = (each for each in rendered("inference-pool") if each["kind"] == "ConfigMap")
    plugins = yaml.safe_load(config["data"]["picker.yaml"])["plugins"]
    [extractor] = (each for each in plugins if each["type"] == "core-metrics-extractor")
    [engine] = extractor["parameters"]["engineConfigs"]
    assert engine["name"] == extractor["parameters"]["defaultEngine"]
    names = {value for key, value in engine.items() if key.endswith("Spec")} | {metric["pods"]["metric"]["name"]}
    assert len(names) == 3
    assert names <= set(documented())
    assert not any(documented()[name] for name in names), "they read one series of each pod"


def test_the_picker_s_plugins_are_there():
    """Each that is referred to is declared."""
    [config] = (each for each in rendered("inference-pool") if each["kind"] == "ConfigMap")
    settings = yaml.safe_load(config["data"]["picker.yaml"])
    declared = {each["type"] for each in settings["plugins"]}
    [profile] = settings["schedulingProfiles"]
    assert {each["pluginRef"] for each in (*profile["plugins"], *settings["requestHandler"]["parsers"])} <= declared


def test_the_picker_asks_at_the_servers_metrics_port():
    """Which is another than that of its calls."""
    manifests = rendered("inference-pool")
    [picker] = find(manifests, "Deployment", "hsrpc-picker")["spec"]["template"]["spec"]["containers"]
    [server] = find(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert f"--model-server-metrics-port={ports['metrics']}" in picker["args"]
    assert find(manifests, "InferencePool")["spec"]["targetPorts"] == [{"number": ports["grpc"]}]


def test_panels_have_a_place_of_their_own():
    """Within the grid's 24 columns, none over another one; ids and titles tell them apart."""
    every = dashboard()["panels"]
    for panel in every:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in every], 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_above
    for key in ("id", "title"):
        assert len({panel[key] for panel in every}) == len(every)
    assert all(panel["description"] for panel in panels())


def test_variables_of_the_dashboard_exist():
    """Those that queries and sources use."""
    made = {variable["name"] for variable in dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard()["panels"]))) - {"__rate_interval"}
    assert used == made


def test_every_alert_is_in_the_guide_and_in_the_tests():
    """With what it means, and with series that make it fire."""
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))
    assert set(re.findall(r"^\| `(Hsrpc\w+)` \|", GUIDE.read_text(), re.MULTILINE)) == set(names)
    checked = [check for test in yaml.safe_load(ALERTS.read_text())["tests"] for check in test["alert_rule_test"]]
    assert {check["alertname"] for check in checked if check["exp_alerts"]} == set(names)
    assert {check["alertname"] for check in checked if not check["exp_alerts"]} == set(names)


@pytest.mark.skipif(
    shutil.which("promtool") is None and "CI" not in os.environ,
    reason="promtool is missing: apt-get install prometheus",
)
def test_alerts_fire_when_they_should(tmp_path):
    """By Prometheus' own tests of rules, in alerts.yaml."""
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(find(rendered("metrics"), "PrometheusRule")["spec"]))
    shutil.copy(ALERTS, tmp_path)
    command = ["promtool", "test", "rules", "alerts.yaml"]
    ran = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
