"""Drawings: every step and edge is there, nothing overlaps, and no text gets out of its label."""

import itertools
import re
import xml.etree.ElementTree as ET

import fieldlab_common.dag as d
import fieldlab_common.forms as forms
import pytest
from fieldlab_common.deployment import Background, Condition, Graph, Need, On, StepSpec
from fieldlab_common.drawing import Box, Drawing, Kind, Line, Standing, drawing_of
from fieldlab_common.errors import CycleError, DefinitionError, UnsupportedError
from fieldlab_common.layout import arrange
from fieldlab_common.lifecycle import StepState
from fieldlab_common.task import task
from hypothesis import given, settings
from hypothesis import strategies as st

SVG = "{http://www.w3.org/2000/svg}"
NASTY = "<b>&\"'`#;\\N\n]]>--> end\x00\u202e ümlaut %% {x}"


@task
def work(*values: object) -> int:
    return len(values)


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(svg).iter(f"{SVG}text")]


def every_kind() -> d.DAG:
    with d.DAG("all") as dag:
        sniff = forms.background(work().named("sniff"))
        first = work().named("first").during(sniff)
        work(first).named("data")
        work().named("success").after(first)
        work().named("failure").after(first, on="failure")
        work().named("always").after(first, on="always")
        work(first.error).named("told").after(first, on="failure", need="any")
        work().named("if").when(first, bool)
        forms.repeat(work(first).named("again"), times=2)
        forms.map_(work, first).named("each")
    return dag


EDGES = {
    ("sniff", "first", "during"),
    ("first", "data", "data"),
    ("first", "success", "success"),
    ("first", "failure", "failure"),
    ("first", "always", "always"),
    ("first", "told", "failure"),
    ("first", "if", "if"),
    ("first", "again", "data"),
    ("first", "each", "data"),
}


def test_a_picture_of_a_dag_has_every_step_and_tells_every_edge() -> None:
    svg = every_kind().to_svg()
    told = {one.text for one in ET.fromstring(svg).iter(f"{SVG}title")}
    assert {f"{a} → {b}: {kind}" for a, b, kind in EDGES} <= told
    assert set(every_kind().steps) | {kind.value for kind in Kind} <= set(texts(svg))
    assert {"background", "repeated", "for each item", "any one edge"} <= set(texts(svg))


def test_each_kind_of_line_is_drawn_in_another_way() -> None:
    groups = [g for g in ET.fromstring(every_kind().to_svg()).iter(f"{SVG}g") if "→" in g[0].text]
    styles = {g[0].text.rpartition(": ")[2]: g[1].get("stroke-dasharray") for g in groups}
    assert len(set(styles.values())) == len(Kind)


def test_mermaid_has_every_step_and_edge() -> None:
    text = every_kind().to_mermaid()
    names = dict(re.findall(r'^    (n\d+)[\[(]+"(.+?)(?:<br/>.*)?"[\])]+$', text, re.M))
    assert sorted(names.values()) == sorted(every_kind().steps)
    edges = re.findall(r"^    (n\d+) (\S.*?) (n\d+)$", text, re.M)
    words = {"-->": "data", "-.->": "success"}
    found = {(names[a], names[b], words.get(how) or re.search(r'"(.+)"', how)[1]) for a, how, b in edges}
    assert found == EDGES


def test_dot_has_every_step_and_edge() -> None:
    text = every_kind().to_dot()
    names = {number: label.split(r"\n")[0] for number, label in re.findall(r'^    (n\d+) \[label="(.+?)"', text, re.M)}
    edges = {(names[a], names[b]) for a, b in re.findall(r"^    (n\d+) -> (n\d+) \[", text, re.M)}
    assert edges == {(a, b) for a, b, _ in EDGES}


def test_a_graph_is_drawn_with_how_its_steps_stand() -> None:
    steps = (
        StepSpec(name="sniff", task="t", code="", args="", background=Background()),
        StepSpec(
            name="one",
            task="t",
            code="",
            args="",
            during=("sniff",),
            needs=(Need(step="sniff", on=On.ALWAYS, data=True),),
            when=Condition(step="sniff", code=""),
        ),
    )
    drawing = drawing_of(
        Graph(name="g", steps=steps), {"one": Standing(state=StepState.FAILED, note="timeout · 30.0 s")}
    )
    assert [line.kind for line in drawing.lines] == [Kind.CONDITION, Kind.DURING]
    assert "failed · timeout · 30.0 s" in texts(drawing.to_svg())
    assert "class n1 failed" in drawing.to_mermaid()
    assert 'n1 [label="one\\nfailed · timeout · 30.0 s", fillcolor="#fee2e2"' in drawing.to_dot()


def test_no_text_gets_out_of_its_label() -> None:
    standing = Standing(state=StepState.FAILED, note=NASTY)
    boxes = (Box(name=NASTY, standing=standing), Box(name="plain"))
    drawing = Drawing(title=NASTY, boxes=boxes, lines=(Line(source=NASTY, target="plain", kind=Kind.DATA),))
    assert any(text.startswith("<b>&\"'`#;\\N\ufffd]]>") for text in texts(drawing.to_svg()))
    label = drawing.to_mermaid().splitlines()[1]
    assert re.fullmatch(r'    n0\["(?:[\w .\-·]|#\d+;|<br/>)+"\]', label)
    assert label.startswith('    n0["#60;b#62;#38;#34;#39;#96;#35;#59;#92;N#65533;')
    quoted = re.findall(r'"(?:[^"\\]|\\.)*"', drawing.to_dot(), re.S)
    assert quoted[0].startswith(r'"<b>&\"' + "'`#;" + r"\\N")
    assert drawing.to_dot().count("\n") == 6


def test_what_is_drawn_can_still_be_changed() -> None:
    dag = d.Pipeline("p").then(work())
    assert "work-2" not in dag.to_mermaid()
    dag.then(work())
    assert "work-2" in dag.to_mermaid()


def test_a_notebook_is_shown_the_picture_if_there_can_be_one() -> None:
    dag = d.DAG("empty")
    assert dag._repr_html_() is None
    assert dag._repr_svg_() is None
    with dag:
        work()
    assert dag._repr_svg_() == dag.to_svg() == dag.to_svg()._repr_svg_()
    assert dag.to_svg() in (dag._repr_html_() or "")


def test_what_has_no_order_or_nothing_to_show_says_so() -> None:
    with pytest.raises(DefinitionError, match="no step"):
        d.DAG("empty").to_dot()
    with d.DAG("circle") as dag:
        a, b = work(), work()
        a >> b >> a
    with pytest.raises(CycleError):
        dag.to_svg()


def test_a_picture_that_nobody_could_read_is_refused_with_a_way_out() -> None:
    boxes = tuple(Box(name=f"s{i}") for i in range(1001))
    with pytest.raises(UnsupportedError, match="1001 steps") as caught:
        Drawing(title="big", boxes=boxes).to_svg()
    assert "to_dot" in str(caught.value.advice)
    assert Drawing(title="big", boxes=boxes).to_dot().count("label=") == 1001


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[str], dict[str, float], list[tuple[str, str, str]]]:
    names = [f"s{i}" for i in range(draw(st.integers(1, 40)))]
    widths = {name: draw(st.floats(20, 250)) for name in names}
    pairs = st.tuples(st.sampled_from(names), st.sampled_from(names), st.sampled_from(["data", "during"]))
    lines = [(a, b, c) for a, b, c in draw(st.lists(pairs, max_size=80)) if names.index(a) < names.index(b)]
    return names, widths, lines


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_boxes_do_not_overlap_and_lines_go_down(graph: tuple) -> None:
    names, widths, lines = graph
    layout = arrange(names, widths, lines)
    for a, b, _ in lines:
        assert layout.boxes[a][1] < layout.boxes[b][1]
    for number in range(layout.layers):
        row = sorted((x, name) for name, (x, layer) in layout.boxes.items() if layer == number)
        assert 0 < len(row) <= 9
        for (x, left), (y, right) in itertools.pairwise(row):
            assert y - x >= (widths[left] + widths[right]) / 2 + 10
        passing = [
            (x, path[i])
            for path, places in zip(layout.points, layout.lines, strict=True)
            for i, x in enumerate(places)
            if layout.boxes[names[path[0]]][1] + i == number and path[i] >= len(names)
        ]
        for x, _ in passing:
            assert all(abs(x - y) > widths[name] / 2 for y, name in row)
    for (a, b, _), places in zip(lines, layout.lines, strict=True):
        assert len(places) == layout.boxes[b][1] - layout.boxes[a][1] + 1
        assert (places[0], places[-1]) == (layout.boxes[a][0], layout.boxes[b][0])
    assert all(
        x - widths[name] / 2 + 1e-6 >= 0 and x + widths[name] / 2 <= layout.width + 1e-6
        for name, (x, _) in layout.boxes.items()
    )


def test_a_tree_is_drawn_without_crossings_whatever_the_order_of_its_branches() -> None:
    names = ["root", "a", "b", "c", "c1", "b1", "a1"]
    lines = [("root", n, "") for n in "abc"] + [("c", "c1", ""), ("b", "b1", ""), ("a", "a1", "")]
    at = arrange(names, dict.fromkeys(names, 60.0), lines).boxes
    assert sorted("abc", key=lambda n: at[n]) == sorted("abc", key=lambda n: at[f"{n}1"])


def test_a_wide_fan_out_stays_narrow() -> None:
    names = ["split", *(f"s{i}" for i in range(98)), "join"]
    lines = [("split", n, "") for n in names[1:-1]] + [(n, "join", "") for n in names[1:-1]]
    layout = arrange(names, dict.fromkeys(names, 80.0), lines)
    assert layout.width < 1800


def nested():
    with d.DAG("inner") as inner:
        work(work(1).named("a")).named("b")
    with d.DAG("outer") as outer:
        first = work(1).named("first")
        forms.repeat(inner(), times=2).named("rounds").after(first)
    return outer


def test_a_dag_inside_is_a_frame_in_mermaid():
    lines = nested().to_mermaid().splitlines()
    start = lines.index('    subgraph n1["rounds<br/>DAG of 2 steps · repeated"]')
    assert lines[start + 1 : start + 5] == [
        '        n1_0["a"]',
        '        n1_1["b"]',
        "        n1_0 --> n1_1",
        "    end",
    ]
    assert "    n0 -.-> n1" in lines


def test_a_dag_inside_is_a_cluster_in_dot_and_lines_end_at_its_edge():
    text = nested().to_dot()
    assert "compound=true;" in text
    assert "subgraph cluster_n1 {" in text
    assert "n0 -> n1_0 [style=dashed, lhead=cluster_n1];" in text


def test_in_the_picture_it_is_a_box_that_says_how_many_steps_it_has():
    assert "DAG of 2 steps · repeated" in nested().to_svg()


def test_a_run_colours_what_is_inside():
    graph = Graph(
        name="g",
        steps=(
            StepSpec(
                name="s",
                task="t",
                code="",
                args="",
                graph=Graph(name="i", steps=(StepSpec(name="a", task="t", code="", args=""),)),
            ),
        ),
    )
    text = drawing_of(
        graph, {"s/a": Standing(state=StepState.FAILED), "s": Standing(state=StepState.FAILED)}
    ).to_mermaid()
    assert "class n0,n0_0 failed" in text
