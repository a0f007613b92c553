"""The engine: passes until every sequence is finished."""
