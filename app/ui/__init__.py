"""The pages of the app, in Gradio: they call ``app.serve.service`` and know nothing below it."""
