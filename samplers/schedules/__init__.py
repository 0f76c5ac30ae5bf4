"""Noise schedules: closed forms, published tables, and searches for better ones.

A schedule is the list of noise levels at which a run evaluates its network, as σ/α from noise to
data: ∞ at pure noise, where a flow starts; where the run ends (mostly 0) is not in the list. In
these units one list serves a variance-preserving process and a flow (whose own σ is
``r/(1 + r)``). Everything here is a pure function on numpy arrays and imports no torch.
"""
