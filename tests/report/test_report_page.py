"""The report as a page: complete in itself, described, readable in both themes and on a phone."""

import itertools
import re
from urllib.parse import unquote

from browser import contrast, find_cut_off, needs_chromium


def test_the_page_is_complete_in_itself(report):
    page = report.page
    links = page.attributes("src", "href", "xlink:href", "srcset", "action", "data")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert [link for link in links if not link.startswith(("#", "data:"))] == []
    assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
    assert not {"script", "iframe", "object", "embed"} & {tag for tag, _ in page.tags}
    assert "@import" not in report.html and not re.search(r"url\((?!#)", report.html)
    assert report.results.html_bytes == len(report.html.encode()) < 1_500_000


def test_figures_are_written_embedded_and_described(report):
    folder, results, page = report.folder, report.results, report.page
    names = {"baselines", "training", "density"}
    names |= {f"ablation_{name}" for name in results.specific}
    assert set(results.figures) == names
    files = {path.name for path in (folder / "figures").iterdir()}
    assert files == {f"{name}.{end}" for name in names for end in ("png", "svg")}
    described = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(described) == len(names)
    assert all(attrs["role"] == "img" and len(attrs["aria-label"]) > 40 for attrs in described)
    assert sum(tag == "figcaption" for tag, _ in page.tags) == len(names)
    linked = re.findall(r"\]\((figures/[^)]+)\)", report.markdown)
    assert len(linked) == len(names) and all((folder / unquote(link)).exists() for link in linked)


def test_headings_go_down_one_level_at_a_time(report):
    levels = [int(tag[1]) for tag, _ in report.page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_tokens_arrive_as_they_are(report):
    assert "<b>6 & 2</b> |" in report.page.text and "<b>&amp;" in report.page.text  # as text, not as markup
    assert not any(attrs for tag, attrs in report.page.tags if tag == "b" and "style" not in attrs)
    assert "\\<b\\>&amp;amp;↵↵" in report.markdown and re.search(r"<b>[^<]+</b>", report.markdown)


def test_one_maximum_per_context_is_bold_and_coloured(report):
    strips = re.findall(r'<span class="strip">(.*?)</span> <small>', report.html, re.DOTALL)
    assert len(strips) > 20
    for strip in strips:
        assert len(re.findall(r'<b style="--heat:', strip)) == 1
        heats = [float(heat) for heat in re.findall(r"--heat:([0-9.]+)", strip)]
        assert heats and all(0 <= heat <= 1 for heat in heats)


def test_text_stands_out_in_both_themes(report):
    style = re.search(r"<style>(.*?)</style>", report.html, re.DOTALL).group(1)
    themes = re.findall(r"color-scheme: light dark;\s*(.*?)\}|dark\) \{\s*:root \{(.*?)\}", style, re.DOTALL)
    assert len(themes) == 2
    for theme in ("".join(parts) for parts in themes):
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", theme))
        warm = re.search(r"--warm: (\d+) (\d+) (\d+)", theme).groups()
        colours["warm"] = "#" + "".join(f"{int(channel):02x}" for channel in warm)
        pairs = [("ink", "warm"), ("no", "paper"), *itertools.product(("ink", "soft", "link"), ("paper", "card"))]
        for ink, paper in pairs:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


@needs_chromium
def test_nothing_is_wider_than_a_phone(report, tmp_path):
    assert find_cut_off(report.folder / "index.html", tmp_path / "profile", "screen", 360) == []
