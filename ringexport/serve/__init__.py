"""An HTTP server in OpenAI's form, on top of continuous batching."""

from ringexport.serve.app import create_app
from ringexport.serve.listener import allow_many_files
from ringexport.serve.options import ServeOptions
from ringexport.serve.server import Server, bind, url_of

__all__ = ["ServeOptions", "Server", "allow_many_files", "bind", "create_app", "url_of"]
