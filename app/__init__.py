"""The application around accel: command line, and the session that a UI or a batch runs on.

No method logic lives here: a request and a plan go in, pictures and a report come out.
"""
