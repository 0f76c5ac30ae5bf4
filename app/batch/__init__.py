"""``accel batch``: thousands of rows, nothing lost, one machine or many.

What is durable is the output, not the engine: a row is an id, a hash of all that its picture
depends on, and a seed that follows from the id. It is done when its file has its name and a line
of the manifest says so; a resume makes what the manifest lacks. Doing a row twice does no harm.
"""
