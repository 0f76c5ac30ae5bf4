"""The events of the pages: what answers at once has no part in a queue that may lose it."""

import gradio as gr
from pages import Memory, drawn

from app.ui import page
from app.ui.events import TURNS


def events_of_the_pages():
    """Each private event that asks the server, and the states whose changes are heard."""
    found = []

    def build():
        page.build(Memory())
        block = gr.context.Context.root_block
        states = {id for id, part in block.blocks.items() if isinstance(part, gr.State)}
        found.extend(block.fns.values())
        return states

    heard = set()
    drawn(lambda: heard.update(build()))
    changed = {id for event in found for id, name in event.targets if name == "change"}
    asked = [event for event in found if event.fn and event.api_visibility != "public"]
    return asked, heard & changed


def test_only_what_streams_takes_turns_or_tells_of_a_state_is_queued():
    asked, heard = events_of_the_pages()
    assert len(asked) > 40 and len(heard) == 3
    for event in asked:
        told = heard & {part._id for part in event.outputs}
        emptied = told & {id for id, _ in event.targets}
        turns = event.concurrency_limit == TURNS["concurrency_limit"]
        needs = event.types_generator or turns or bool(told - emptied)
        assert event.queue == needs or event.targets == [(None, "unload")], event.name
