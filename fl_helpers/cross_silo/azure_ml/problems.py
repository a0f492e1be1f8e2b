"""What Azure refuses, in plain words, with what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

REMEDIES = [  # (in the text of an error, what it means, what to do)
    (
        "SubscriptionNotFound",
        "there is no such subscription for you",
        "compare silos.yaml with `az account show`; `az login --tenant TENANT`",
    ),
    (
        "ResourceGroupNotFound",
        "there is no such resource group",
        "correct resource_group in silos.yaml, or create it: docs/azure-ml.md",
    ),
    (
        "InvalidAuthenticationTokenTenant",
        "you are signed in to another tenant",
        "`az login --tenant TENANT`",
    ),
    (
        "quota",
        "there are too few cores for you in this region",
        "ask for more in the Azure portal under Quotas, Machine learning",
    ),
    (
        "AuthorizationPermissionMismatch",
        "a role on the storage account is missing",
        "ask its owner for `Storage Blob Data Contributor`; a new role takes up to an "
        "hour",
    ),
    (
        "AuthorizationFailure",
        "the storage account does not let this machine in",
        "work from inside its network: docs/azure-ml.md",
    ),
    (
        "public network access",
        "the workspace does not let this machine in",
        "work from inside its network: docs/azure-ml.md",
    ),
    (
        "already exists",
        "there was a run of this name",
        "give each run a name of its own",
    ),
]


class AzureProblem(RuntimeError):
    """Something in Azure is missing, refused or failed; the message says what to do.

    jobs: those of a run that failed, by name. passes: another try may work, as the
    connection or the service is away.
    """

    def __init__(
        self, message: str, jobs: Iterable[str] = (), *, passes: bool = False
    ) -> None:
        super().__init__(message)
        self.jobs, self.passes = tuple(jobs), passes


@contextmanager
def in_plain_words(what: str) -> Iterator[None]:
    """Turn the errors of the Azure libraries into AzureProblem.

    what: the subject of the message, such as "workspace 'x'".
    """
    from azure.ai.ml.exceptions import MlException
    from azure.core.exceptions import AzureError

    try:
        yield
    except (AzureError, MlException) as error:
        problem = AzureProblem(f"{what}: {explain(error)}", passes=_passes(error))
        raise problem from error


def _passes(error: Exception) -> bool:
    from azure.core.exceptions import (
        HttpResponseError,
        ServiceRequestError,
        ServiceResponseError,
    )

    status = getattr(error, "status_code", None) or 0
    away = isinstance(error, ServiceRequestError | ServiceResponseError)
    away |= isinstance(error, HttpResponseError) and not status  # cut in the middle
    return away or status >= 500 or status in (408, 429)


def explain(error: Exception) -> str:
    """What an error of the Azure libraries means; what to do."""
    from azure.core.exceptions import ClientAuthenticationError, ServiceRequestError

    status, text = getattr(error, "status_code", None), str(error)
    for sign, meaning, remedy in REMEDIES:
        if sign.lower() in text.lower():
            return f"{meaning}; {remedy}"
    action = re.search(r"perform action '([^']+)'", text)
    if status == 403 or action:
        what = f" for {action[1]}" if action else ""
        return (
            f"a role is missing{what}; ask the workspace's owner for `AzureML Data "
            "Scientist`; a new role takes up to an hour, then sign in again"
        )
    if status == 401 or isinstance(error, ClientAuthenticationError):
        return "you are not signed in; `az login`, then try again"
    if status == 404:
        return "it is not there; correct the name, or create it: docs/azure-ml.md"
    if isinstance(error, ServiceRequestError):
        return "Azure cannot be reached; look at the network, the proxy and DNS"
    text = re.sub(r"sig=[^&\s'\"]+", "sig=...", text)  # what opens a store
    return f"Azure refuses: {text[:2000]}"
