"""`@task.moegen`: a function that says which table, and the job over it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from airflow.sdk.bases.decorator import DecoratedOperator, TaskDecorator, determine_kwargs, task_decorator_factory
from airflow.sdk.definitions._internal.types import SET_DURING_EXECUTION
from airflow.sdk.definitions.context import context_merge

from moegen_airflow.exceptions import MoegenInputError
from moegen_airflow.operator import MoegenBatchOperator

if TYPE_CHECKING:
    from airflow.sdk import Context


class _MoegenDecoratedOperator(DecoratedOperator, MoegenBatchOperator):
    """Calls the function on a worker; what it returns is the operator's `input_uri`, as it is, never templated.

    It is called once per attempt, also of deferred tasks: these resume without it.
    """

    template_fields: Sequence[str] = (
        *DecoratedOperator.template_fields,
        *(name for name in MoegenBatchOperator.template_fields if name != "input_uri"),
    )
    template_fields_renderers: ClassVar[dict[str, str]] = {
        **DecoratedOperator.template_fields_renderers,
        **MoegenBatchOperator.template_fields_renderers,
    }
    custom_operator_name = "@task.moegen"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.pop("multiple_outputs", False):
            raise MoegenInputError("multiple_outputs: @task.moegen returns one manifest; leave it out")
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            input_uri=SET_DURING_EXECUTION,
            **kwargs,
        )

    def execute(self, context: Context) -> Any:
        """As `MoegenBatchOperator.execute`; raises `MoegenInputError` when the function returns no URI."""
        context_merge(context, self.op_kwargs)
        kwargs = determine_kwargs(self.python_callable, self.op_args, context)
        self.input_uri = _uris(self.python_callable(*self.op_args, **kwargs))
        return MoegenBatchOperator.execute(self, context)


def _uris(returned: object) -> str | list[str]:
    if isinstance(returned, str) and returned.strip():
        return returned
    uris = returned if isinstance(returned, Sequence) and not isinstance(returned, str) else ()
    if uris and all(isinstance(uri, str) and uri.strip() for uri in uris):
        return list(uris)
    raise MoegenInputError(
        f"the function under @task.moegen returned a {type(returned).__name__}; return the table's URI, or a list of "
        "URIs that is not empty"
    )


def moegen_task(python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> TaskDecorator:
    """A function that returns the table's URI, or a list of them, as a task that runs the job over it.

    :param python_callable: the function.
    :param kwargs: those of `MoegenBatchOperator`, but for `input_uri`.
    """
    return task_decorator_factory(
        python_callable=python_callable, decorated_operator_class=_MoegenDecoratedOperator, **kwargs
    )
