"""Every error that this project raises on purpose.

AccelError
├── PlanError            a plan that cannot be read, or cannot be what it says
│   ├── UnknownMethod    a method name that no installed package offers
│   └── Conflict         two methods that cannot go together
├── UnsupportedModel     a pipeline that a method, or the project, cannot serve
├── BadInput             an argument, a file or a picture that cannot be used (a ValueError too)
│   └── BadModel         a model folder that is missing, truncated or empty
├── BrokenAttachment     something changed the pipeline under an attached plan
├── BadOutput            a run that produced NaN or infinite latents
├── NotReached           a target that no plan which was tried holds
└── NotWritten           a result that could not be written: a full disk, a refusing folder

A message says what was found, what was needed and what to do next.
"""


class AccelError(Exception):
    """Root of every error that this project raises on purpose."""


class PlanError(AccelError):
    """A plan that cannot be read, or cannot be what it says."""


class UnknownMethod(PlanError):
    """A method name that no installed package offers."""


class Conflict(PlanError):
    """Two methods of one plan that cannot go together."""


class UnsupportedModel(AccelError):
    """A pipeline that a method, or the project, cannot serve."""


class BadInput(AccelError, ValueError):
    """An argument, a file or a picture that cannot be used."""


class BadModel(BadInput):
    """A model folder that is missing, truncated or empty."""


class BrokenAttachment(AccelError):
    """Something changed the pipeline under an attached plan."""


class BadOutput(AccelError):
    """A run that produced NaN or infinite latents."""


class NotReached(AccelError):
    """A target that no plan which was tried holds."""


class NotWritten(AccelError):
    """A result that could not be written: a full disk, a refusing folder."""


class AccelWarning(UserWarning):
    """Something the user should know: a method that did nothing, a run that is not reproducible."""
