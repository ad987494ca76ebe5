"""Codes and statuses of errors: programs and servers of other versions know them."""

from __future__ import annotations

from agentlightning import errors

CODES = {
    "bad_request": ("BadRequest", 400),
    "conflict": ("Conflict", 409),
    "corrupt_store": ("CorruptStore", 500),
    "disk_full": ("DiskFull", 507),
    "execution_failed": ("ExecutionFailed", 500),
    "foreign_file": ("ForeignFile", 503),
    "id_reused": ("IdReused", 409),
    "illegal_move": ("IllegalMove", 409),
    "internal": ("AgentLightningError", 500),
    "invalid_id": ("InvalidId", 422),
    "invalid_value": ("InvalidValue", 422),
    "missing_extra": ("MissingExtra", 500),
    "newer_schema": ("NewerSchema", 503),
    "no_such_route": ("NoSuchRoute", 404),
    "not_allowed": ("NotAllowed", 403),
    "not_authenticated": ("NotAuthenticated", 401),
    "not_found": ("NotFound", 404),
    "not_json": ("NotJson", 422),
    "nothing_to_learn": ("NothingToLearn", 500),
    "overloaded": ("Overloaded", 429),
    "spool_full": ("SpoolFull", 503),
    "stale_attempt": ("StaleAttempt", 409),
    "store_closed": ("StoreClosed", 503),
    "store_forked": ("StoreForked", 503),
    "store_owned": ("StoreOwned", 503),
    "store_stopped": ("StoreStopped", 503),
    "store_unavailable": ("StoreUnavailable", 503),
    "store_unreachable": ("StoreUnreachable", 503),
    "template_out_of_bounds": ("TemplateOutOfBounds", 422),
    "too_large": ("TooLarge", 413),
    "unsupported_media_type": ("UnsupportedMedia", 415),
    "wrong_server": ("WrongServer", 409),
}


def test_codes_and_statuses_never_change() -> None:
    found = {code: (cls.__name__, cls.status) for code, cls in errors.error_classes().items() if is_ours(cls)}
    assert found == CODES


def is_ours(cls: type[errors.AgentLightningError]) -> bool:
    return cls.__module__ == errors.__name__


def test_a_class_of_somebody_else_crosses_as_its_base_class() -> None:
    class Missing(errors.NotFound):
        """One of a store that a user wrote."""

    assert Missing.code == "not_found"
