"""A student behind the interface of OpenAI: which engine serves it, and how it is started."""
