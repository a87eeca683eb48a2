"""The database: the models, and ``request.dbsession``, which belongs to the transaction of the request."""

from __future__ import annotations

from pathlib import Path

import zope.sqlalchemy
from sqlalchemy import engine_from_config
from sqlalchemy.orm import configure_mappers, sessionmaker

from demo.models.meta import Base
from demo.models.signup import SignUp

__all__ = ['Base', 'SignUp', 'includeme']

configure_mappers()


def get_tm_session(session_factory, transaction_manager, request):
    """Return a session that commits and rolls back with *transaction_manager*."""
    dbsession = session_factory(info={'request': request})
    zope.sqlalchemy.register(dbsession, transaction_manager=transaction_manager)
    return dbsession


def includeme(config):
    """Open the database of the setting ``sqlalchemy.url``, create what it lacks, and add ``request.dbsession``."""
    settings = config.get_settings()
    settings['tm.manager_hook'] = 'pyramid_tm.explicit_manager'

    engine = engine_from_config(settings, 'sqlalchemy.')
    Path(engine.url.database).parent.mkdir(parents=True, exist_ok=True)
    # A demo has no migrations; an app of your own has Alembic here.
    Base.metadata.create_all(engine)

    session_factory = sessionmaker(bind=engine)
    config.registry['dbsession_factory'] = session_factory
    config.add_request_method(
        lambda request: get_tm_session(session_factory, request.tm, request), 'dbsession', reify=True
    )
