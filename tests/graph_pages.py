"""What tests of the page share: what it shows, and what a reader does with it."""

import json
from collections import Counter

import numpy as np

FEATURE = "cross layer transcoder"


def show(browser, address, every_node=True):
    browser.open(address)
    browser.wait("window.attributionGraph && attributionGraph.painted")
    if every_node and "#" not in address:  # the first view has the most influential nodes alone
        slide(browser, "nodes", 1)
    browser.settle()


def scores(document):
    """Of each link: its share of its target's input times the influence of the target, over all paths."""
    place = {node["node_id"]: n for n, node in enumerate(document["nodes"])}
    share_NxN = np.zeros((len(place), len(place)))  # targets by sources
    for link in document["links"]:
        share_NxN[place[link["target"]], place[link["source"]]] = abs(link["weight"])
    share_NxN /= np.maximum(share_NxN.sum(axis=1, keepdims=True), 1e-30)
    weight_N = np.array([node["token_prob"] if node["feature_type"] == "logit" else 0 for node in document["nodes"]])
    influence_N = weight_N @ np.linalg.inv(np.eye(len(place)) - share_NxN)
    return [(influence_N[:, None] * share_NxN)[place[li["target"]], place[li["source"]]] for li in document["links"]]


def strongest(document, node_id, into):
    """The edges into (out of) a node as (other end, weight, score), the largest score first."""
    own, other = ("target", "source") if into else ("source", "target")
    links = zip(document["links"], scores(document), strict=True)
    edges = [(link[other], link["weight"], score) for link, score in links if link[own] == node_id]
    return sorted(edges, key=lambda edge: (-edge[2], -abs(edge[1])))


def busy_feature(document):
    """A feature with several inputs and outputs."""
    ids = [node["node_id"] for node in document["nodes"] if node["feature_type"] == FEATURE]
    ends = [Counter(link[end] for link in document["links"]) for end in ("source", "target")]
    return max(ids, key=lambda i: min(count[i] for count in ends))


def place_of(browser, node_id):
    return browser.js(f"attributionGraph.place({json.dumps(node_id)})")


def click_node(browser, node_id, modifiers=0):
    place = place_of(browser, node_id)
    browser.click(place["x"], place["y"], modifiers)


def state(browser, name):
    return browser.js(f"attributionGraph.state.{name}")


def clicked(browser):
    return state(browser, "clickedId")


def rows(browser, which):
    browser.settle()
    return browser.js(f"[...document.querySelectorAll('#panel .{which} .row')].map(row => row.dataset.node)")


def drag_last_box(browser, dx, dy):
    """Drags the last box of the pinned subgraph with the pointer, and returns where it was and where it is."""
    box = "document.querySelector('#subgraph .unit:last-of-type').getBoundingClientRect()"
    browser.js("document.querySelector('#subgraph .unit').scrollIntoView({block: 'center'})")
    browser.settle()
    x, y = browser.js(f"[{box}.x, {box}.y]")
    steps = (("mousePressed", 0, 0), ("mouseMoved", dx / 2, 0), ("mouseMoved", dx, dy), ("mouseReleased", dx, dy))
    for kind, right, down in steps:
        at = dict(x=x + 20 + right, y=y + 10 + down)
        browser.send("Input.dispatchMouseEvent", type=kind, button="left", buttons=1, clickCount=1, **at)
    browser.settle()
    moved = browser.js(f"[{box}.x, {box}.y]")
    browser.js("scrollTo(0, 0)")  # back to the graph
    return (x, y), moved


def text(browser, selector):
    browser.settle()
    return browser.js(f"document.querySelector({json.dumps(selector)}).innerText")


def slide(browser, slider, value):
    """Moves a slider; the browser sends the page the events of a real one."""
    browser.js(f"(() => {{ const s = document.getElementById('{slider}'); s.focus(); s.value = {value};"
               " s.dispatchEvent(new Event('input', {bubbles: true})); })()")  # fmt: skip
    browser.settle()
