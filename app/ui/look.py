"""How the pages look: a calm theme, the colours of our own HTML in light and dark, the keyboard.

``PALETTE`` is the one place of colours; a test computes the contrast of each pair in ``PAIRS``.
"""

from __future__ import annotations

import gradio as gr

PALETTE: dict[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#161b22"),
    "ink": ("#1f2933", "#e6edf3"),
    "quiet": ("#52606d", "#a9b4c0"),
    "line": ("#d3d9e0", "#38414c"),
    "accent": ("#1f5fa8", "#7db3f0"),
    "on-accent": ("#ffffff", "#0d1117"),
    "good": ("#14622f", "#8ddba4"),
    "good-paper": ("#e6f4ea", "#12301c"),
    "bad": ("#8c1d18", "#ffb4ab"),
    "bad-paper": ("#fbe9e7", "#3b1512"),
    "warn": ("#6b4500", "#f5d27a"),
    "warn-paper": ("#fff4d6", "#3a2c05"),
    "computed": ("#2f5597", "#6d96e0"),
    "on-computed": ("#ffffff", "#0d1117"),
    "reused": ("#f4b183", "#e09a63"),
    "on-reused": ("#1f2933", "#0d1117"),
    "predicted": ("#a9d18e", "#8dbb70"),
    "on-predicted": ("#1f2933", "#0d1117"),
    "mixed": ("#d7d2e8", "#a99fd0"),
    "on-mixed": ("#1f2933", "#0d1117"),
}
"""By name: in light, in dark."""

PAIRS: tuple[tuple[str, str], ...] = (
    ("ink", "paper"),
    ("quiet", "paper"),
    ("accent", "paper"),
    ("on-accent", "accent"),
    ("good", "good-paper"),
    ("bad", "bad-paper"),
    ("warn", "warn-paper"),
    ("on-computed", "computed"),
    ("on-reused", "reused"),
    ("on-predicted", "predicted"),
    ("on-mixed", "mixed"),
)
"""What is written on what: at least 4.5 to 1 (WCAG AA) in light and in dark."""

FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "monospace")


def theme() -> gr.themes.Base:
    """The theme, for ``launch(theme=…)``. Its fonts are the system's: nothing is downloaded."""
    light = {name: pair[0] for name, pair in PALETTE.items()}
    dark = {name: pair[1] for name, pair in PALETTE.items()}
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        font=FONT,
        font_mono=MONO,
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_background_fill=light["paper"],
        body_background_fill_dark=dark["paper"],
        body_text_color=light["ink"],
        body_text_color_dark=dark["ink"],
        body_text_color_subdued=light["quiet"],
        body_text_color_subdued_dark=dark["quiet"],
        block_info_text_color=light["quiet"],
        block_info_text_color_dark=dark["quiet"],
        block_label_text_color=light["ink"],
        block_label_text_color_dark=dark["ink"],
        block_title_text_color=light["ink"],
        block_title_text_color_dark=dark["ink"],
        input_placeholder_color=light["quiet"],
        input_placeholder_color_dark=dark["quiet"],
        button_primary_background_fill=light["accent"],
        button_primary_background_fill_dark=dark["accent"],
        button_primary_background_fill_hover=light["accent"],
        button_primary_background_fill_hover_dark=dark["accent"],
        button_primary_text_color=light["on-accent"],
        button_primary_text_color_dark=dark["on-accent"],
        checkbox_border_color=light["quiet"],
        checkbox_border_color_dark=dark["quiet"],
        link_text_color=light["accent"],
        link_text_color_dark=dark["accent"],
    )


def _variables(side: int) -> str:
    return " ".join(f"--accel-{name}: {pair[side]};" for name, pair in PALETTE.items())


CSS = (
    f":root {{ {_variables(0)} }}\n.dark {{ {_variables(1)} }}\n"
    + """
.gradio-container { width: 100%; max-width: 1180px !important; margin: 0 auto; }
.gradio-container [role="tab"][aria-selected="true"] { color: var(--accel-accent); }
.gradio-container .html-container.html-container { padding: 0; }
.gradio-container :focus-visible { outline: 3px solid var(--accel-accent); outline-offset: 2px; }
.gradio-container [inert] { opacity: 0.6; }

.accel-badge, .accel-banner {
  margin: 0; padding: 0.6rem 0.9rem; border-radius: 8px; color: var(--accel-ink);
  background: var(--background-fill-secondary); overflow-wrap: anywhere;
}
.accel-badge strong { font-size: 1.15rem; color: inherit; }
.accel-banner p { margin: 0.15rem 0; color: inherit; }
.accel-banner strong { color: inherit; }
.accel-faster { color: var(--accel-good); background: var(--accel-good-paper); }
.accel-slower, .accel-error { color: var(--accel-bad); background: var(--accel-bad-paper); }
.accel-warning { color: var(--accel-warn); background: var(--accel-warn-paper); }
.accel-quiet { color: var(--accel-quiet); margin: 0; }
.accel-scroll + .accel-quiet { margin: 0.4rem 0; }

.accel-person { display: flex; gap: 0.75rem; justify-content: flex-end; align-items: center; }
.accel-person span { color: var(--accel-quiet); overflow-wrap: anywhere; }
.accel-person button {
  padding: 0.3rem 0.9rem; border-radius: 8px; cursor: pointer; color: var(--accel-ink);
  background: var(--background-fill-secondary); border: 1px solid var(--accel-line);
}

.accel-progress p { margin: 0 0 0.3rem; color: var(--accel-ink); overflow-wrap: anywhere; }
.accel-progress progress { width: 100%; height: 0.7rem; accent-color: var(--accel-accent); }

.accel-preview { width: 100%; max-width: 256px; image-rendering: auto; border-radius: 8px; }

.accel-scroll { overflow-x: auto; max-width: 100%; }
.accel-table { border-collapse: collapse; color: var(--accel-ink); font-size: 0.9rem; }
.accel-table caption { text-align: left; font-weight: 600; padding: 0.3rem 0; }
.accel-table th, .accel-table td {
  padding: 0.25rem 0.6rem; text-align: left; border: 1px solid var(--accel-line);
  vertical-align: top;
}
.accel-table td { min-width: 4.5rem; overflow-wrap: break-word; }
.accel-table thead th { background: var(--background-fill-secondary); }
.accel-timeline th, .accel-timeline td { padding: 0.1rem; min-width: 1.35rem; text-align: center; }
.accel-timeline th[scope="row"] {
  position: sticky; left: 0; padding: 0.1rem 0.5rem; text-align: left; white-space: nowrap;
  background: var(--accel-paper);
}
.gradio-container .accel-timeline td span { color: inherit; }
.gradio-container .accel-computed {
  color: var(--accel-on-computed); background: var(--accel-computed);
}
.gradio-container .accel-reused {
  color: var(--accel-on-reused); background: var(--accel-reused);
}
.gradio-container .accel-predicted {
  color: var(--accel-on-predicted); background: var(--accel-predicted);
}
.gradio-container .accel-mixed { color: var(--accel-on-mixed); background: var(--accel-mixed); }
.accel-legend { display: flex; flex-wrap: wrap; gap: 0.3rem 1.2rem; padding: 0.4rem 0; margin: 0; }
.accel-legend li { list-style: none; margin: 0; color: var(--accel-ink); }
.accel-legend li [class] { display: inline-block; width: 1.35rem; text-align: center; }
.accel-said {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap;
}

.accel-plot svg { display: block; width: 100%; height: auto; max-height: 26rem; }
.accel-plot text { fill: var(--accel-ink); font-size: 13px; }
.accel-plot .accel-axis { stroke: var(--accel-quiet); }
.accel-plot .accel-grid { stroke: var(--accel-line); }
.accel-plot .accel-point { cursor: pointer; fill: var(--accel-accent); stroke: var(--accel-paper); }
.accel-plot .accel-point text { fill: var(--accel-on-accent); font-size: 12px; }
.accel-plot .accel-stock { fill: var(--accel-quiet); }
.accel-plot .accel-stock text { fill: var(--accel-paper); }
.accel-plot .accel-rough circle { stroke-dasharray: 4 2; stroke: var(--accel-ink); }
.accel-plot .accel-front { fill: none; stroke: var(--accel-accent); stroke-dasharray: 2 4; }
.accel-plot .accel-point:focus-visible { outline: none; stroke: var(--accel-ink); stroke-width: 3; }

.accel-shot {
  display: grid; justify-items: center; padding: 0.2rem; border-radius: 6px; cursor: pointer;
  color: var(--accel-ink); background: var(--accel-paper); border: 1px solid var(--accel-line);
}
.accel-shot img, .accel-shot video { width: 9rem; max-width: none; height: auto; margin: 0; }
.accel-stock-shot { display: flex; gap: 0.6rem; align-items: center; padding: 0.3rem 0; }
.gradio-container .accel-shot span, .accel-stock-shot span { color: var(--accel-ink); }

.gradio-container .caption-label { white-space: normal; overflow-wrap: anywhere; }

.accel-method { padding: 0.8rem 0; border-top: 1px solid var(--accel-line); }
.accel-method h2 { margin: 0; font-size: 1.05rem; color: var(--accel-ink); }
.accel-method p { margin: 0.25rem 0; color: var(--accel-ink); overflow-wrap: anywhere; }
.accel-method .accel-quiet { color: var(--accel-quiet); }
.accel-tag {
  display: inline-block; padding: 0 0.5rem; border-radius: 6px; font-size: 0.85rem;
  font-weight: 600; color: var(--accel-ink); background: var(--background-fill-secondary);
}
.accel-tag.accel-fits { color: var(--accel-good); background: var(--accel-good-paper); }
.accel-tag.accel-unfit { color: var(--accel-warn); background: var(--accel-warn-paper); }

@media (max-width: 640px) {
  .gradio-container { padding: 0.5rem !important; }
  .gradio-container button { min-height: 44px; }
  .gradio-container .grid-container { grid-template-columns: repeat(2, 1fr); }
  .accel-plot text { font-size: 20px; }
  .accel-shot img, .accel-shot video { width: 6rem; }
  .accel-timeline th[scope="row"] { white-space: normal; min-width: 7rem; overflow-wrap: anywhere; }
}
@media (prefers-reduced-motion: reduce) {
  * { animation-duration: 0.01ms !important; transition-duration: 0.01ms !important; }
}
"""
)

HEAD = '<meta name="color-scheme" content="light dark">'

KEYS = """() => {
  const LIST = "[role=combobox][aria-expanded=true], [aria-haspopup][aria-expanded=true]";
  const OVER = "dialog[open], [aria-modal=true], .block.fullscreen";
  let open = false;
  document.addEventListener("keydown", () => {
    open = Boolean(document.activeElement?.matches(LIST) || document.querySelector(OVER)
      || document.fullscreenElement);
  }, true);
  document.addEventListener("keydown", (event) => {
    const wanted = event.key === "Enter" && (event.ctrlKey || event.metaKey) ? "generate"
      : event.key === "Escape" ? "stop" : null;
    if (!wanted || open || event.defaultPrevented || event.isComposing) return;
    const button = document.getElementById(wanted);
    if (button && !button.disabled && button.offsetParent !== null) {
      event.preventDefault();
      button.click();
    }
  });
}"""
"""Once loaded: Ctrl+Enter presses ``generate`` and Esc ``stop``, if they are seen and enabled.

Not where the key belongs to something else: a list that is open, a dialog, a full screen. Whether
one is open is looked at before it hears the key, and closes. As an event of the page, because the
content security policy refuses scripts in its head.
"""

NAMES = """() => {
  const name = () => {
    for (const button of document.querySelectorAll(".image-container button:not([aria-label])")) {
      const label = button.closest(".block")?.querySelector("[data-testid=block-label]");
      if (label) button.setAttribute("aria-label", label.textContent.trim());
    }
    for (const empty of document.querySelectorAll(".empty[aria-label]:not([role])")) {
      empty.setAttribute("role", "img");
    }
  };
  new MutationObserver(name).observe(document.body, { childList: true, subtree: true });
  name();
}"""
"""Gradio puts a picture into a button without a name: it gets that of its block. A place without a
picture has a name and no role: it gets one."""

JOINS = """() => {
  const fetched = window.fetch;
  window.fetch = async (...asked) => {
    const answer = await fetched(...asked);
    if (String(asked[0]?.url ?? asked[0]).includes("/queue/join")) {
      await new Promise((heard) => setTimeout(heard, 50));
    }
    return answer;
  };
}"""
"""Once loaded: Gradio's client hears of its place in the queue 50 ms later.

The client opens a stream for the answers unless it has one; but one whose end is on its way still
counts, and what has just joined would wait for a stream that nobody opens.
"""
