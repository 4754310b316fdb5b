"""The chat page in Chromium; skipped if there is none."""

import base64
import io
import time

import numpy as np
import pytest
import soundfile
from browser import browser, chromium
from fake_engine import FakeEngine, served
from tiny import tiny_picture

from finetune.serving.http.page import page

pytestmark = [pytest.mark.slow, pytest.mark.skipif(chromium() is None, reason="no browser: apt-get install chromium")]
EMPTY = "!at('question').value && !chosen.length"
SHIFT = 8


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    with browser(chromium(), tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    engine = FakeEngine()
    with served(engine, tmp_path_factory.mktemp("media")) as (address, _):
        yield engine, address


@pytest.fixture
def engine(running):
    running[0].__init__()
    return running[0]


@pytest.fixture
def chat(window, engine, running):
    """A fresh page; at the end it has had no errors, and has fetched nothing from elsewhere."""
    window.open(running[1])
    window.wait("models.length")
    yield window
    assert not window.errors()
    addresses = (one for one in window.requests() if not one.startswith(("data:", "blob:")))
    assert all(one.startswith(running[1]) for one in addresses)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    tiny_picture(size=(60, 40)).save(path)
    return path


def ask(window, text, turns):
    window.run("at('question').focus()")
    window.type(text)
    window.enter()
    window.wait(f"turns.length === {turns} && !asking")


def answers(window):
    return window.run("[...document.querySelectorAll('.assistant p')].map((one) => one.textContent)")


def test_a_conversation_about_a_picture(chat, engine, picture):
    assert "pictures, sound, video" in chat.run("at('log').innerText")
    chat.choose("#file", picture)
    chat.wait("chosen.length === 1 && document.querySelector('#chosen img').naturalWidth === 60")
    ask(chat, "what 红?", 2)
    assert answers(chat) == ["60x40 what 红? "] and chat.run(EMPTY)
    ask(chat, "and now?", 4)
    assert answers(chat)[1] == "and now? " and "2 tokens" in chat.run("at('log').innerText")
    first, second = (request.messages for request in engine.requests)
    assert second[:1] == (first[0],) or [m.role for m in second] == ["user", "assistant", "user"]
    assert np.array_equal(np.asarray(engine.decoded[0]), np.asarray(tiny_picture(size=(60, 40))))
    chat.click("#clear")
    assert chat.run("turns.length") == 0 and "pictures" in chat.run("at('log').innerText")


def test_an_empty_page_does_not_scroll(chat):
    assert chat.run("document.documentElement.scrollHeight - innerHeight") == 0


def test_the_question_of_the_training_is_offered(chat):
    chat.click(".hint button")
    assert chat.run("at('question').value") == "What is this?"
    assert chat.run("document.querySelectorAll('.hint button').length") == 1


def test_a_picture_is_dropped_or_pasted_or_taken_back(chat, engine, picture):
    chat.drop(400, 300, picture)
    chat.wait("chosen.length === 1")
    assert chat.run("at('drop').hidden")
    encoded = base64.b64encode(picture.read_bytes()).decode()
    chat.run(
        f"""(() => {{ const data = new DataTransfer();
        const bytes = Uint8Array.from(atob('{encoded}'), (c) => c.charCodeAt(0));
        data.items.add(new File([bytes], 'a.png', {{type: 'image/png'}}));
        document.dispatchEvent(new ClipboardEvent('paste', {{clipboardData: data, bubbles: true}})); }})()"""
    )
    chat.wait("chosen.length === 2")
    chat.click("#chosen button")
    chat.wait("chosen.length === 1")
    assert chat.run("chosen[0].name") == "a.png"
    ask(chat, "what?", 2)
    assert answers(chat) == ["60x40 what? "]


def test_speech_is_recorded(chat, engine):
    chat.click("#record")
    chat.wait("!!recorder")
    assert chat.run("at('record').getAttribute('aria-pressed')") == "true"
    time.sleep(1.2)  # the browser's own microphone for tests beeps once a second
    chat.click("#record")
    chat.wait("chosen.length === 1")
    ask(chat, "what?", 2)
    samples = engine.decoded[0]
    assert 0.8 < len(samples) / 16_000 < 10 and np.abs(samples).max() > 0.01
    sent = base64.b64decode(chat.run("turns[0].content[0].input_audio.data"))
    info = soundfile.info(io.BytesIO(sent))
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("WAV", "PCM_16", 16_000, 1)


def test_sound_and_video_are_files_too(chat, engine, tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(8_000, np.float32), 16_000)
    chat.choose("#file", tmp_path / "a.flac")
    chat.wait("chosen.length === 1")
    ask(chat, "what?", 2)
    assert answers(chat) == ["0.5s what? "]
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    chat.choose("#file", tmp_path / "a.pdf")
    chat.wait("!at('wrong').hidden")
    assert "a.pdf" in chat.run("at('wrong').textContent") and chat.run("chosen.length") == 0


@pytest.mark.parametrize("how", ["button", "escape"])
def test_an_answer_is_stopped(chat, engine, how):
    engine.step_seconds = 0.05
    chat.run("at('question').focus()")
    chat.type("word " * 400)
    chat.enter()
    chat.wait("document.querySelector('.assistant p')?.textContent.length > 15")
    assert not chat.run("at('stop').hidden") and chat.run("at('send').hidden")
    chat.click("#stop") if how == "button" else chat.press("Escape", 27)
    chat.wait("!asking")
    end = time.monotonic() + 5
    while not engine.cancelled and time.monotonic() < end:
        time.sleep(0.02)
    assert engine.cancelled == 1 and "Stopped" in chat.run("at('log').innerText")
    engine.step_seconds = 0
    ask(chat, "go on", 4)  # the conversation stays


def test_errors_are_shown_and_the_question_comes_back(chat, engine, picture):
    engine.busy_from = 0
    chat.choose("#file", picture)
    chat.wait("chosen.length === 1")
    chat.type("what?")
    chat.enter()
    chat.wait("!at('wrong').hidden && !asking")
    assert "too many requests" in chat.run("at('wrong').textContent")
    assert chat.run("at('question').value") == "what?" and chat.run("chosen.length") == 1 and not answers(chat)
    chat.events = [event for event in chat.events if "429" not in str(event)]
    engine.busy_from = 100
    chat.run("at('question').focus()")
    chat.enter()
    chat.wait("turns.length === 2 && !asking")
    assert chat.run("at('wrong').hidden") and answers(chat) == ["60x40 what? "]


def test_an_answer_that_breaks_off_says_so(chat, engine):
    engine.fails_after = 2
    chat.run("at('question').focus()")
    chat.type("a b c")
    chat.enter()
    chat.wait("!at('wrong').hidden && !asking")
    assert answers(chat) == ["a b "] and "broke off" in chat.run("at('log').innerText")


def test_answers_are_shown_as_text(chat):
    hostile = "<img/src=x/onerror=window.hurt=1><script>window.hurt=1</script>"
    ask(chat, hostile, 2)
    assert answers(chat) == [hostile + " "] and not chat.run("window.hurt")


def test_labels_and_numbers(chat):
    chat.run("at('task').value = 'mood'")
    ask(chat, "what mood?", 2)
    assert answers(chat) == ["good"] and "75.0%" in chat.run("at('log').innerText")
    chat.run("at('task').value = 'stars'")
    ask(chat, "seven c", 4)
    assert answers(chat)[1] == "7"


def test_the_keyboard_is_enough(chat):
    chat.run("at('question').focus()")
    chat.type("one")
    chat.press("Enter", 13, "\r", SHIFT)
    chat.type("two")
    assert chat.run("at('question').value") == "one\ntwo" and chat.run("turns.length") == 0
    chat.run("document.body.focus(), document.activeElement.blur()")
    reached = []
    for _ in range(10):
        chat.press("Tab", 9)
        reached.append(chat.run("document.activeElement.id"))
    assert set(reached) >= {"model", "task", "clear", "log", "attach", "record", "question", "send"}, reached


def test_everything_has_a_name_and_fits_narrow_windows(chat, picture):
    chat.choose("#file", picture)
    chat.wait("chosen.length === 1")
    chat.type("what is this?")
    chat.enter()
    chat.wait("turns.length === 2 && !asking")
    chat.choose("#file", picture)
    chat.wait("chosen.length === 1")
    controls = [
        (role, name) for role, name in chat.names() if role in ("button", "textbox", "combobox", "image", "log")
    ]
    assert len(controls) >= 9 and all(name for _, name in controls), controls
    for width in (320, 500, 1200):
        chat.resize(width, 600)
        assert chat.run("document.documentElement.scrollWidth") <= width
        assert chat.run("at('send').getBoundingClientRect().bottom") <= 600, width


def test_in_chinese(window, running):
    window.open(running[1], language="zh-CN")
    window.wait("models.length")
    assert window.run("document.documentElement.lang") == "zh"
    assert window.run("at('send').textContent") == "发送" and "图片、声音、视频" in window.run("at('log').innerText")
    assert window.run("Object.keys(WORDS.en).join() === Object.keys(WORDS.zh).join()")


def test_a_model_for_text_only(chat):
    chat.run("at('model').value = '写字', at('model').dispatchEvent(new Event('change'))")
    assert chat.run("at('attach').hidden && at('record').hidden && at('task-field').hidden")
    assert "text only" in chat.run("at('log').innerText")
    ask(chat, "hello", 2)
    assert answers(chat) == ["hello "]


def test_the_key_is_asked_for(window, tmp_path):
    with served(FakeEngine(), tmp_path, api_key="schlüssel") as (address, _):
        window.open(address)
        for key in ("wrong", "schlüssel"):
            window.wait("at('key-dialog').open && !at('key').value")
            window.type(key)
            window.enter()
        window.wait("models.length")
        ask(window, "hello", 2)
        assert answers(window) == ["hello "]


def test_the_page_can_fetch_from_nowhere_else(chat, running):
    script = "(() => fetch('http://localhost:1/').then(() => 'asked', () => 'refused'))()"
    assert chat.run(script) == "refused"
    assert any("Content Security Policy" in one for one in chat.errors())
    chat.events = []


def test_the_file_refers_to_nothing_else():
    html, headers = page()
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert not [word for word in ("http://", "https://", "src=", "@import", "url(") if word in html]
