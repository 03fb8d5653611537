"""The documents say what the code does, as far as a machine can tell."""

import re
from pathlib import Path

from engine.loader.catalogue import CATALOGUE
from serve_app.config import AppConfig
from serve_app.metrics import ENGINE_METRICS, INGRESS_METRICS
from tests.documents import DOCUMENTS, ROOT, codes_in_sentences

LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def rows(document: str) -> dict[str, list[str]]:
    """Table rows whose first cell is code, by that code."""
    found = {}
    for line in (ROOT / document).read_text().splitlines():
        if match := re.match(r"\| `([^`]+)`", line):
            found[match[1]] = [cell.strip() for cell in line.strip("|").split("|")]
    return found


def test_every_argument_is_documented_with_its_default() -> None:
    documented = rows("docs/arguments.md")
    assert set(documented) == set(AppConfig.model_fields)
    for name, field in AppConfig.model_fields.items():
        default = str(field.default).lower() if field.default in (None, True, False) else str(field.default)
        assert documented[name][1].strip("`") == default, name


def test_every_model_of_the_catalogue_is_documented() -> None:
    documented = rows("docs/models.md")
    for name, entry in CATALOGUE.items():
        _, hub_id, licence, size = documented[name]
        assert hub_id.startswith(entry.hub_id or "none: ships with Slipstream")
        assert licence.startswith(entry.licence)
        amount, unit = size.split()
        size_bytes = float(amount) * {"MB": 1e6, "GB": 1e9}[unit]
        assert abs(size_bytes / entry.size_bytes - 1) < 0.05


def test_every_metric_is_documented_with_its_type() -> None:
    documented = {name: cells[1] for name, cells in rows("docs/metrics.md").items()}
    specs = [spec for spec, _ in ENGINE_METRICS] + list(INGRESS_METRICS)
    assert documented == {spec.name: spec.kind.value for spec in specs}


def anchors(document: Path) -> set[str]:
    """What GitHub calls the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    assert {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "models.md"} <= {document.name for document in DOCUMENTS}
    for document in DOCUMENTS:
        for target, anchor in LINK.findall(document.read_text()):
            path = document.parent / target if target else document
            assert path.exists(), f"{document.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{document.name}: {target}#{anchor}"


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {target for target, _ in LINK.findall((ROOT / "README.md").read_text())}
    assert {str(document.relative_to(ROOT)) for document in DOCUMENTS} - {"README.md"} <= linked


# What models, runs and readers bring, and what our commands write.
ELSEWHERE = re.compile(
    r".*config\.(json|yaml)|tokenizer.*\.json|.*_map\.json|model\..*\.json|(NEW|before|after|slipstream-kernels)\.json|results/run\..*"
)
OURS = "engine|serve_app|slipstream_cli|loadtest|benchmarks|tools|tests"


def test_files_and_modules_that_are_named_exist() -> None:
    """In code within sentences; links are looked at above."""
    files = {
        str(path.relative_to(ROOT))
        for folder in ("docs", "deploy", *OURS.split("|"))
        for path in (ROOT / folder).rglob("*.*")
    } | {path.name for path in ROOT.iterdir()}
    missing, found = [], 0
    for document in DOCUMENTS:
        codes = codes_in_sentences(document)
        words = {word.strip(".,()") for code in codes for word in re.split(r"[\s:=]+", code)}
        for word in words:
            if re.fullmatch(r"[\w./-]+\.(py|sh|toml|svg|html|yaml|json|md)", word) and not ELSEWHERE.fullmatch(word):
                exists = any(file == word or file.endswith(f"/{word}") for file in files)
            elif re.fullmatch(rf"({OURS})(\.[a-z_]\w*)+", word):
                exists = any((ROOT / word.replace(".", "/")).with_suffix(suffix).exists() for suffix in ("", ".py"))
            elif re.fullmatch(r"test_\w+", word):
                exists = any(file.endswith(f"/{word}.py") for file in files)
            else:
                continue
            found += 1
            missing += [] if exists else [f"{document.name}: {word}"]
    assert missing == []
    assert found > 20


def test_speeds_in_the_readme_are_those_of_the_performance_tables() -> None:
    readme, tables = ((ROOT / name).read_text() for name in ("README.md", "docs/performance.md"))
    speeds = [
        number
        for line in re.findall(r"^\| (?:SmolLM2|TinyLlama|Mistral).*$", readme, re.MULTILINE)
        for number in re.findall(r"\b\d{1,3}(?:,\d{3})+\b|\b\d{3}\b", line.split("|", 2)[2])
    ]
    assert len(speeds) == 16
    assert [speed for speed in speeds if not re.search(rf"(?<![\d,]){speed}(?![\d,])", tables)] == []


def test_sequence_diagrams_have_no_semicolons() -> None:
    """Mermaid takes one for the end of a statement, and GitHub then shows an error in place of the diagram."""
    diagrams = [
        (document.name, diagram)
        for document in DOCUMENTS
        for diagram in re.findall(
            r"^```mermaid\nsequenceDiagram\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL
        )
    ]
    assert len(diagrams) >= 3
    assert [name for name, diagram in diagrams if ";" in diagram] == []
