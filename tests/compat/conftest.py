"""The node schemas, as the node tests read them."""

from tests.nodes.conftest import schemas as schemas
