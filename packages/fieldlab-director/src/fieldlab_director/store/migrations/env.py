"""How Alembic runs the steps here: on the connection that ``upgrade`` hands over, never on one of its own."""

from alembic import context

from fieldlab_director.store.schema import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
