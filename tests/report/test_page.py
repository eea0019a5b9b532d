"""The page in a real browser; without Chromium and chromedriver these skip."""

from pathlib import Path

import pytest

from lossprune.report.page import write_page
from lossprune.report.reading import read_results
from lossprune.report.tables import all_tables
from tests.report.browser import Browser, browser, missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def window():
    with browser() as opened:
        yield opened


def draw(results: Path, out: Path, embed: float = 1e7) -> Path:
    read = read_results(results)
    write_page(read, all_tables(read.runs), out, [], embed)
    return out


@pytest.fixture(scope="module")
def report(digits_results, tmp_path_factory) -> Path:
    return draw(digits_results, tmp_path_factory.mktemp("report"))


@pytest.fixture
def page(window, report) -> Browser:
    window.size(1280, 900)
    window.scheme("light")
    window.open(report / "index.html")
    return window


def column(page: Browser, table: str, heading: str) -> list[str]:
    return page.run(
        """const box = document.querySelector(`[data-table="${arguments[0]}"]`);
        const heads = [...box.querySelectorAll("th")].map((th) => th.textContent);
        const place = heads.indexOf(arguments[1]);
        const rows = [...box.querySelectorAll("tbody tr")];
        return rows.map((tr) => tr.children[place].textContent);""",
        table,
        heading,
    )


def sort_by(page: Browser, table: str, heading: str) -> None:
    place = page.run(
        """return [...document.querySelectorAll(`[data-table="${arguments[0]}"] th`)]
        .findIndex((th) => th.textContent === arguments[1]) + 1""",
        table,
        heading,
    )
    page.click(f'[data-table="{table}"] th:nth-child({place}) button')


def choose(page: Browser, facet: str, value: str) -> None:
    page.click(f'#filter-{facet} input[value="{value}"]')


def test_it_draws_every_figure_table_and_run_without_a_complaint(page, digits_results):
    titles = page.run(
        "return [...document.querySelectorAll('#charts h3')].map((h) => h.textContent)"
    )
    assert titles == [
        "Loss after pruning against λ",
        "Error after fine-tuning against stages",
        "Loss change against error gap after fine-tuning",
        "Predicted against realised loss change, stage by stage",
        "Weights kept, layer by layer",
        "Validation error while fine-tuning",
    ]
    assert page.run("return document.querySelectorAll('#charts .empty').length") == 0
    marks = page.run(
        """return [...document.querySelectorAll('#charts .figure')].map((figure) =>
        figure.querySelectorAll('circle, path.line').length)"""
    )
    assert all(marks)
    assert len(column(page, "runs", "seed")) == 20
    loss_change = all_tables(read_results(digits_results).runs)[0].frame
    means = [f"{mean:+.4f}" for mean in loss_change["mean"]]
    assert column(page, "loss-change", "ΔL mean") == means
    assert page.console() == []


def test_marks_are_where_the_numbers_are(page):
    broken = page.run(
        """const bad = [];
        for (const mark of document.querySelectorAll('#charts circle')) {
          const [x, y] = [mark.cx.baseVal.value, mark.cy.baseVal.value];
          const {width, height} = mark.ownerSVGElement;
          if (!(x >= 0 && x <= width.baseVal.value && y >= 0 && y <= height.baseVal.value))
            bad.push(mark.outerHTML);
        }
        for (const line of document.querySelectorAll('#charts path'))
          if (/NaN|Infinity|undefined/.test(line.getAttribute('d'))) bad.push(line.outerHTML);
        return bad;"""
    )
    assert broken == []


@pytest.mark.parametrize(
    ("facet", "value", "heading", "left"),
    [
        ("criterion", "QM", "criterion", {"QM"}),
        ("stages", "5", "π", {"5"}),
        ("reg", "1e-3", "λ", {"1e-3"}),
        ("seed", "1112", "seed", {"1112"}),
    ],
)
def test_a_filter_leaves_the_runs_it_names(page, facet, value, heading, left):
    choose(page, facet, value)
    assert set(column(page, "runs", heading)) == left
    assert page.run("return document.getElementById('seed-note').hidden") == (facet != "seed")
    page.click("#clear")
    assert len(column(page, "runs", "seed")) == 20


def test_filters_act_together_and_on_figures_and_tables(page):
    choose(page, "criterion", "QM")
    choose(page, "criterion", "MP")
    choose(page, "stages", "1")
    assert set(column(page, "runs", "criterion")) == {"MP", "QM"}
    assert set(column(page, "loss-change", "criterion")) == {"MP", "QM"}
    panels = page.run(
        "return [...document.querySelectorAll('#charts .figure')[0].querySelectorAll('figcaption')]"
        ".map((caption) => caption.textContent)"
    )
    assert panels == ["QM, n = 2"]
    choose(page, "stages", "5")
    choose(page, "stages", "1")
    choose(page, "criterion", "QM")
    assert page.run("return document.querySelectorAll('#charts .empty').length") == 6
    assert page.console() == []


def test_a_line_is_the_mean_of_the_seeds_that_are_shown(page, digits_results):
    def first_point() -> str:
        return page.run("return document.querySelector('#charts circle title').textContent")

    assert first_point().endswith("n = 2")
    choose(page, "seed", "1111")
    assert first_point().endswith("n = 1")


@pytest.fixture(scope="module")
def sparsity_report(sparsity_results, tmp_path_factory) -> Path:
    return draw(sparsity_results, tmp_path_factory.mktemp("report"))


@pytest.fixture
def sparsities(window, sparsity_report) -> Browser:
    window.size(1280, 900)
    window.scheme("light")
    window.open(sparsity_report / "index.html")
    return window


def tiles(page: Browser) -> dict[str, str]:
    return dict(
        page.run(
            """return [...document.querySelectorAll('.tile')].map((tile) =>
            [tile.querySelector('dt').textContent, tile.querySelector('dd').textContent])"""
        )
    )


def dots_of_first_figure(page: Browser) -> list[str]:
    return page.run(
        """return [...document.querySelector('#charts .figure').querySelectorAll('circle title')]
        .map((title) => title.textContent)"""
    )


def test_error_against_sparsity_is_over_all_sparsities_and_obeys_filters(sparsities):
    page = sparsities
    titles = page.run(
        "return [...document.querySelectorAll('#charts h3')].map((h) => h.textContent)"
    )
    assert titles[0] == "Loss and error against sparsity"
    assert all(title.endswith(", 80 % removed") for title in titles[1:])
    means = [text for text in dots_of_first_figure(page) if "kept" in text]
    assert len(means) == 3 * 2 * 3  # panels, criteria, sparsities
    assert all(text.endswith("n = 2") for text in means)
    levels = page.run(
        """return [...document.querySelectorAll('#charts .figure')[0]
        .querySelectorAll('line.dash title')].map((title) => title.textContent)"""
    )
    assert len(levels) == 3
    assert all(text.startswith("dense: ") for text in levels)
    choose(page, "criterion", "QM")
    choose(page, "seed", "1112")
    choose(page, "reg", "1e-3")
    means = [text for text in dots_of_first_figure(page) if "kept" in text]
    assert len(means) == 3 * 3
    assert all("λ 1e-3: " in text and text.endswith("n = 1") for text in means)
    assert page.console() == []


def test_the_sparsity_chosen_is_that_of_all_else(sparsities):
    page = sparsities
    assert len(column(page, "runs", "seed")) == 6 + 2  # and the dense networks
    assert len(column(page, "error-against-sparsity", "removed")) == 2 * 6
    page.run(
        "const s = document.getElementById('sparsity'); s.selectedIndex = 2;"
        "s.dispatchEvent(new Event('change'))"
    )
    assert {"0.95", "–"} >= {text[:4] for text in column(page, "runs", "sparsity")}
    assert "at 95 % removed" in tiles(page)["Lowest loss change by pruning"]
    assert len(column(page, "error-against-sparsity", "removed")) == 2 * 6
    assert page.console() == []


def test_tiles_are_of_the_runs_shown_and_say_best_of_what(sparsities, sparsity_results):
    runs = read_results(sparsity_results).runs.query("prunes and sparsity == 0.8")
    page = sparsities

    def expected(own):
        by_method = own.groupby(["criterion", "reg"])[["best_valid_error", "best_test_error"]]
        best = by_method.mean().sort_values("best_valid_error", kind="stable").iloc[0]
        return f"{100 * best['best_test_error']:.2f} %"

    shown = tiles(page)
    assert shown["runs"] == "8of 20 in the report"
    best = shown["Test error at the lowest validation error"]
    assert best.startswith(expected(runs))
    assert "of 3 criteria, π and λ at 80 % removed, 6 runs" in best
    choose(page, "criterion", "MP")
    shown = tiles(page)
    assert shown["runs"] == "2of 20 in the report"
    best = shown["Test error at the lowest validation error"]
    assert best.startswith(expected(runs[runs["criterion"] == "MP"]))
    assert "of 1 criterion, π and λ at 80 % removed, 2 runs" in best
    choose(page, "criterion", "MP")


def test_the_rank_correlation_of_a_part_is_that_of_its_runs(page, digits_results):
    runs = read_results(digits_results).runs
    part = runs[runs["prunes"] & (runs["criterion"] == "QM") & (runs["stages"] == 5)]
    rho = part["loss_change"].rank().corr(part["error_gap"].rank())
    whole = tiles(page)["Loss change and error gap, Spearman’s ρ"]
    assert "95 % interval" in whole
    choose(page, "criterion", "QM")
    choose(page, "stages", "5")
    shown = tiles(page)["Loss change and error gap, Spearman’s ρ"]
    assert shown == f"{rho:.2f}of the runs shown, n = 4 runs, 2 epochs"


@pytest.mark.parametrize("width", [1280, 700, 390])
def test_text_of_figures_has_one_size_at_any_width(page, width):
    page.size(width, 900)  # without loading the page again
    page.wait(
        """const charts = document.getElementById('charts');
        return [...charts.querySelectorAll('.panels')].every((panels) => [...panels.children]
          .every((panel) => panel.getBoundingClientRect().right
            <= charts.getBoundingClientRect().right + 1));"""
    )
    sizes = page.run(
        """return [...new Set([...document.querySelectorAll('#charts svg text')].map((text) =>
        getComputedStyle(text).fontSize + text.ownerSVGElement.getAttribute('viewBox')))]"""
    )
    assert sizes == ["12pxnull"]


def test_tables_sort_by_number_up_and_down(page):
    sort_by(page, "runs", "loss after")
    losses = [float(text) for text in column(page, "runs", "loss after") if text != "–"]
    assert len(losses) == 18
    assert losses == sorted(losses)
    sort_by(page, "runs", "loss after")
    falling = column(page, "runs", "loss after")
    assert falling[:18] == [text for text in falling if text != "–"]  # nothing sorts last
    assert [float(text) for text in falling[:18]] == losses[::-1]
    states = page.run(
        """return [...document.querySelectorAll('[data-table="runs"] th')]
        .map((th) => th.getAttribute('aria-sort')).filter(Boolean)"""
    )
    assert states == ["descending"]


def test_a_run_opens_with_its_command_log_and_record(page, digits_results):
    sort_by(page, "runs", "loss after")
    page.click('[data-table="runs"] tbody tr .open')
    page.wait("return document.getElementById('detail-record')")
    shown = {
        name: page.run(f"return document.getElementById('detail-{name}').textContent")
        for name in ("command", "log", "record")
    }
    assert shown["command"].startswith("lossprune run --arch MLP --dataset digits --pm QM")
    logs = {path.read_text() for path in digits_results.glob("*/log.txt")}
    records = {path.read_text() for path in digits_results.glob("*/record.json")}
    assert shown["log"] in logs
    assert shown["record"] in records
    linked = page.run("return [...document.querySelectorAll('#detail-body a')].map((a) => a.href)")
    assert all(
        Path(link.removeprefix("file://")).name in ("log.txt", "record.json") for link in linked
    )
    page.click("#detail-close")
    assert page.run("return document.getElementById('detail').open") is False
    assert page.console() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_sticks_out_sideways(page, report, width, scheme):
    page.size(width, 844)
    page.scheme(scheme)
    page.open(report / "index.html")
    assert page.run("return document.documentElement.scrollWidth") == width
    page.click('[data-table="runs"] tbody tr .open')
    page.wait("return document.getElementById('detail-record')")
    wide = page.run(
        "const d = document.getElementById('detail'); return d.scrollWidth - d.clientWidth"
    )
    assert wide == 0
    assert page.console() == []


def test_controls_have_names_and_text_has_contrast(page):
    for scheme in ("light", "dark"):
        page.scheme(scheme)
        assert page.run(CONTRAST) == []
    unnamed = page.run(
        """return [...document.querySelectorAll('button, select, a, input')].filter((node) =>
        !(node.textContent.trim() || node.getAttribute('aria-label') || node.labels?.length))
        .map((node) => node.outerHTML)"""
    )
    assert unnamed == []


def test_the_theme_can_be_switched(page):
    def ground() -> str:
        return page.run("return getComputedStyle(document.body).backgroundColor")

    light = ground()
    page.click("#theme")
    dark = ground()
    assert dark != light
    page.click("#theme")
    assert ground() == light


def test_two_networks_are_shown_one_at_a_time(window, maker, tmp_path):
    for seed in (1, 2):
        maker.run(seed=seed, sparsity=0.9, loss=1.0)
        maker.run(seed=seed, sparsity=0.95, loss=2.0)
    maker.run(seed=3, sparsity=0.95, status="diverged", folder="</script><b>bad</b>")
    window.open(draw(maker.root, tmp_path, embed=0) / "index.html")
    assert column(window, "runs", "loss after") == ["1", "1"]
    window.run(
        "const s = document.getElementById('sparsity'); s.value = '1';"
        "s.dispatchEvent(new Event('change'))"
    )
    assert column(window, "runs", "status") == ["diverged", "finished", "finished"]
    assert column(window, "error-after-fine-tuning", "diverged") == ["1", "1", "1"]
    window.click('[data-table="runs"] tbody tr .open')
    window.wait("return document.querySelector('#detail .note')")
    assert "to stay small" in window.run(
        "return document.querySelector('#detail .note').textContent"
    )
    assert window.console() == []


# WCAG 2.1 contrast of all text that is seen, against the nearest painted ground: at least 4.5.
CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
  .reduce((sum, v, place) => sum + v * [0.2126, 0.7152, 0.0722][place], 0);
const ground = (node) => {
  for (; node; node = node.parentElement) {
    const colour = parse(getComputedStyle(node).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
const low = [];
for (const node of document.querySelectorAll('body *:not(script)')) {
  if (node.disabled || node.closest('dialog') || !node.getClientRects().length) continue;
  if (![...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())) continue;
  const style = getComputedStyle(node);
  const ink = parse(node instanceof SVGElement ? style.fill : style.color);
  const [a, b] = [light(ink), light(ground(node))].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) low.push(`${node.tagName} ${node.textContent.slice(0, 30)}`);
}
return low;
"""
