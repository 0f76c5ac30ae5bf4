"""The app behind its pages: jobs in a durable queue, a worker process a device, files out.

Nothing here knows of Gradio or of HTTP. `app.serve.service.Service` is what both talk to.
"""
