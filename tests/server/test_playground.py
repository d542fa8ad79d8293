"""The playground, in headless Chromium, asking real servers with an exported model."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SERVED, SERVED_CONTEXT, tiny_config

from tfclm.client import Client

PROMPT = "The import statement, isn't\n\nnaïve 😀"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, servable_dir: Path
) -> Iterator[Callable[..., Any]]:
    """Starts a server with a tiny model under the name `a<b` and settings; `.url` is its address."""
    from contextlib import ExitStack

    from transformers import AutoTokenizer

    from tfclm.checkpoint import create
    from tfclm.savedmodel import saving
    from tfclm.savedmodel.graph.signatures import GenerationModule
    from tfclm.savedmodel.settings import ServableSettings
    from tfclm.server.server import Server
    from tfclm.server.settings import ServeSettings

    folder = tmp_path_factory.mktemp("tiny")
    model = create(tiny_config("gpt2", context=SERVED_CONTEXT))

    def export(version: Path, **others: Any) -> None:
        settings = ServableSettings(**{**SERVED, **others})
        saving.write(GenerationModule(model, AutoTokenizer.from_pretrained(tokenizer_dir), settings), version)

    shutil.copytree(servable_dir, folder / "1")
    with ExitStack() as stack:

        def start(**flags: Any) -> Any:
            flags = {"port": 0, "rest_api_port": -1, "model_name": "a<b", "shutdown_grace_seconds": 5.0, **flags}
            # Most servers here answer one request, or none: warm-up would take seconds for each.
            flags = {"model_base_path": str(folder), "enable_model_warmup": False, **flags}
            server = Server(ServeSettings(**flags))
            stack.callback(server.stop)
            server.start()
            server.url = f"http://127.0.0.1:{server.rest_port}"
            server.export, server.folder = export, folder
            return server

        yield start


@pytest.fixture(scope="module")
def server(start) -> Any:
    """A server with the page."""
    return start(playground=True)


@pytest.fixture(scope="module")
def closed(start) -> Any:
    """A server as it is by default: without the page, and for pages of its own address alone."""
    return start()


@pytest.fixture(scope="module")
def asked(server) -> Iterator[Client]:
    """The client, whose answers the page has to have."""
    with Client(server.url, "a<b") as client:
        yield client


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium."""
    if not CHROMIUM or not DRIVER:
        pytest.skip("there is no Chromium with its driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1280,1000"):
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page as its reader has it."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver = driver
        driver.get_log("browser")
        driver.get(url)

    def find(self, selector: str) -> Any:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return self.find(selector).get_property("textContent")

    def fill(self, **values: str) -> None:
        for name, value in values.items():
            field = self.find(f"#{name}")
            field.clear()
            # Chromium's driver does not type what lies outside the basic plane.
            self.driver.execute_script("arguments[0].value = arguments[1]", field, value)
            for event in ("input", "change"):
                self.driver.execute_script(
                    "arguments[0].dispatchEvent(new Event(arguments[1], {bubbles: true}))", field, event
                )

    def wait(self, condition: Callable[[], object]) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.driver, 90).until(lambda _: condition())

    def submit(self, form: str) -> None:
        """Presses the form's button, and waits for the end of what it began."""
        button = self.find(f"#{form} [type=submit]")
        self.wait(lambda: "served" in self.text("#state"))
        button.click()
        self.wait(lambda: button.is_enabled())

    def tokens(self, form: str) -> list[tuple[str, list[int], float | None]]:
        """The boxes: text, ids, and the sum of the log-probabilities."""
        boxes = self.driver.execute_script(
            "return [...arguments[0].querySelectorAll('.token')].map("
            "box => [box.textContent, box.dataset.ids, box.dataset.logprob])",
            self.card(form),
        )
        return [(text, [int(part) for part in ids.split()], log and float(log)) for text, ids, log in boxes]

    def card(self, form: str) -> Any:
        return self.driver.execute_script("return arguments[0].closest('section')", self.find(f"#{form}"))

    def said(self, form: str, name: str) -> str:
        return self.card(form).find_element("css selector", f".{name}").get_property("textContent")


@pytest.fixture
def page(driver, server) -> Iterator[Page]:
    """The page of the server, freshly opened; at the end nothing was amiss in its console but replies' statuses."""
    page = Page(driver, f"{server.url}/")
    yield page
    said = [line["message"] for line in driver.get_log("browser")]
    assert not [line for line in said if "Failed to load resource" not in line and "blocked by CORS" not in line]


def test_page_is_whole_and_only_where_it_is_asked_for(closed, server):
    """A page that loads something from elsewhere, runs what a name holds, or is there without the flag."""
    import requests

    reply = requests.get(server.url, timeout=10)
    assert reply.status_code == 200
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = reply.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert not re.findall(r"https?://|@import|\burl\(|<script src|<iframe", reply.text)
    assert 'id="served">["a\\u003cb"]<' in reply.text
    assert requests.get(closed.url, timeout=10).status_code == 404


@pytest.mark.slow
def test_completion_is_the_servers(page, asked):
    """Another text than the server's, parameters that do not arrive, or a default that is not the model's."""
    page.wait(lambda: "version 1 is served" in page.text("#state"))
    shown = {name: page.find(f"#{name}").get_attribute("placeholder") for name in ("top_k", "top_p", "seed", "stop")}
    assert shown == {"top_k": "50", "top_p": "0.95", "seed": "-1", "stop": "none"}
    page.fill(prompt=PROMPT, temperature=".9", seed="9223372036854775807", max_new_tokens="12", stop="zz")
    page.submit("generate")
    expected = asked.generate(PROMPT, temperature=0.9, seed=2**63 - 1, max_new_tokens=12, stop="zz")
    assert page.said("generate", "text") == expected.generated_text
    assert page.said("generate", "error") == ""
    assert f"{expected.completion_tokens} tokens after {expected.prompt_tokens}" in page.said("generate", "facts")
    dimmed = page.card("generate").find_elements("css selector", ".text .prompt")
    assert "".join(box.get_property("textContent") for box in dimmed) == PROMPT


@pytest.mark.slow
@pytest.mark.parametrize("form", ["generate", "score"])
def test_tokens_and_their_log_probabilities_are_the_servers(page, asked, tokenizer, form):
    """A box that is not a token, or has another token's shade."""
    page.fill(**({"scored": PROMPT} if form == "score" else {"prompt": PROMPT, "temperature": "0"}))
    page.submit(form)
    text = PROMPT if form == "score" else asked.generate(PROMPT, temperature=0.0).generated_text
    ids = tokenizer(text)["input_ids"]
    scored = asked.score(text)
    boxes = page.tokens(form)
    assert "".join(box[0] for box in boxes) == text
    assert [number for box in boxes for number in box[1]] == ids == list(scored.token_ids)
    place = 0
    for piece, own, log in boxes:
        assert piece == tokenizer.decode(own)
        expected = sum(scored.token_logprobs[max(place, 1) : place + len(own)])
        place += len(own)
        assert (log or 0.0) == pytest.approx(expected, abs=1e-4)
    # All but the first piece, and characters of several tokens each, have a token a box.
    assert sum(len(own) > 1 for _, own, _ in boxes[1:]) <= sum(ord(character) > 127 for character in text)
    if form == "score":
        assert page.said("score", "facts").startswith(f"perplexity {scored.perplexity:.6g}"[:14])


@pytest.mark.slow
def test_curl_does_the_same(page, asked):
    """A command that the shell takes apart, or that asks for something else."""
    page.fill(prompt=PROMPT, temperature="0.5", seed="123456789012345678", top_k="7")
    command = page.said("generate", "error") or page.card("generate").find_element("css selector", "pre").text
    done = subprocess.run(["bash", "-c", f"{command} -sS"], capture_output=True, text=True, timeout=60, check=True)
    expected = asked.generate(PROMPT, temperature=0.5, seed=123456789012345678, top_k=7)
    assert json.loads(done.stdout)["outputs"]["generated_text"] == [expected.generated_text]
    assert '"seed": [123456789012345678]' in command


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"top_p": "2"}, r"top_p.*2"),
        ({"top_k": "many"}, r"^top_k: give a whole number, not many$"),
        ({"temperature": "1,5"}, r"^temperature: give a number, not 1,5$"),
        ({"seed": "1.5"}, r"^seed: give a whole number, not 1.5$"),
        ({"max_new_tokens": "100000"}, r"max_new_tokens"),
    ],
)
def test_wrong_parameters(page, asked, params, said):
    """An error that is not shown, or that is shown next to the text of another request."""
    page.fill(prompt="The", temperature="0")
    page.submit("generate")
    assert page.said("generate", "text") == asked.generate("The", temperature=0.0).generated_text
    assert page.card("generate").find_element("css selector", ".legend").is_displayed()
    page.fill(**params)
    page.submit("generate")
    assert re.search(said, page.said("generate", "error"))
    assert "\n" not in page.said("generate", "error")
    assert page.said("generate", "text") == ""
    assert not page.card("generate").find_element("css selector", ".legend").is_displayed()


@pytest.mark.slow
def test_servers_elsewhere(page, start, closed, server):
    """A page that can ask no other server, as one in a container, or does not say what is missing there."""
    open_to_all = start(rest_api_enable_cors_support=True)
    page.fill(url=open_to_all.url, prompt="The", temperature="0")
    page.submit("generate")
    with Client(open_to_all.url, "a<b") as client:
        assert page.said("generate", "text") == client.generate("The", temperature=0.0).generated_text
    page.fill(url=closed.url)
    page.wait(lambda: "--rest_api_enable_cors_support" in page.text("#state"))
    page.fill(url=server.url, model="nobody")
    page.wait(lambda: "nobody" in page.text("#state"))


@pytest.mark.slow
def test_another_version(driver, start, server, tmp_path):
    """Defaults and limits of a version that is no longer served, shown or sent to the one that is."""
    import requests

    shutil.copytree(server.folder / "1", tmp_path / "model" / "1")
    other = start(playground=True, model_base_path=str(tmp_path / "model"))
    page = Page(driver, f"{other.url}/")
    page.wait(lambda: "version 1 is served" in page.text("#state"))
    # The second version refuses what the first one has as its default.
    other.export(tmp_path / "new", max_new_tokens=5, max_new_tokens_limit=6, top_k=7)
    (tmp_path / "new").rename(tmp_path / "model" / "2")
    states = f"{other.url}/v1/models/a%3Cb"
    newest = {"version": "2", "state": "AVAILABLE"}
    page.wait(lambda: newest.items() <= requests.get(states, timeout=10).json()["model_version_status"][0].items())
    with Client(other.url, "a<b") as client:
        page.fill(prompt="The", temperature="0")
        page.submit("generate")
        assert page.said("generate", "error") == ""
        assert page.said("generate", "text") == client.generate("The", temperature=0.0).generated_text
        assert page.said("generate", "facts").startswith("5 tokens")
    assert page.find("#top_k").get_attribute("placeholder") == "7"
    assert "version 2 is served" in page.text("#state")
    shutil.rmtree(tmp_path / "model" / "2")
    # Nobody asks anything, and the page sees it all the same.
    page.wait(lambda: "version 1 is served" in page.text("#state"))
    assert page.find("#top_k").get_attribute("placeholder") == "50"


@pytest.mark.slow
def test_stop(page):
    """A request that cannot be stopped, or after which the page takes no other."""
    page.wait(lambda: "served" in page.text("#state"))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        page.fill(url=f"http://127.0.0.1:{silent.getsockname()[1]}")
        page.find("#generate [type=submit]").click()
        page.find("#generate .cancel").click()
        page.wait(lambda: page.said("generate", "error") == "stopped")
        assert page.find("#generate [type=submit]").is_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_looks(page, width, scheme, tmp_path):
    """Something that hangs over the edge of a phone, or cannot be read in the dark."""
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    page.driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    try:
        page.fill(prompt="The import statement " + "x" * 80, scored=PROMPT)
        page.submit("generate")
        page.submit("score")
        page.driver.save_screenshot(str(tmp_path / f"{scheme}-{width}.png"))
        overhang = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.driver.execute_script(overhang) == 0
        assert page.card("score").find_element("css selector", ".legend").is_displayed()
        colors = page.driver.execute_script(
            "const style = getComputedStyle(document.body); return [style.color, style.backgroundColor]"
        )
        text, back = (sum(map(int, re.findall(r"\d+", color)[:3])) for color in colors)
        assert (text < back) == (scheme == "light")
        assert abs(text - back) > 400
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
