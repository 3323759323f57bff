"""The search: a space of policies, a searcher that proposes them, runners that train them, a journal that keeps all."""
