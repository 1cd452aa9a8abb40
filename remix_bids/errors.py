"""Everything that remix-bids raises on purpose.

::

    RemixError                  exit 1, one clear sentence: what, where, what to do
     +-- UsageError             exit 2,  wrong or contradictory arguments
     +-- NothingToDoError       exit 66, the query found no image
     +-- GraphError             exit 70, the workflow could not be built
     +-- MissingResourceError   exit 78, a template or an expert is missing or damaged
     +-- InputImageError        exit 1,  one image cannot be used; the others go on
"""


class RemixError(Exception):
    """Base of all errors with a message meant for the user."""

    exit_code = 1


class UsageError(RemixError):
    """Wrong or contradictory arguments."""

    exit_code = 2


class NothingToDoError(RemixError):
    """The query found no image to work on."""

    exit_code = 66


class GraphError(RemixError):
    """The workflow could not be built."""

    exit_code = 70


class MissingResourceError(RemixError):
    """A template or an expert is missing, damaged or of the wrong kind."""

    exit_code = 78


class InputImageError(RemixError):
    """One image cannot be used; it fails alone."""
