"""The other side of the shell agent: enqueues tasks in a store, waits for them, and prints their rewards.

In three terminals, or on three machines (then with AGL_API_KEY set, and --host 0.0.0.0 for the store):

    agl store
    agl runner --url http://127.0.0.1:4747 --exec "sh examples/shell_agent/agent.sh"
    python examples/shell_agent/ask.py http://127.0.0.1:4747
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import agentlightning as agl

FILES = [path for path in sorted(Path(__file__).parent.iterdir()) if path.is_file()]


async def main(url: str) -> int:
    store = agl.LightningStoreClient(url)
    try:
        rollouts = [
            await store.enqueue_rollout({"path": str(path), "words": len(path.read_text().split())}, mode="val")
            for path in FILES
        ]
        ended = await store.wait_for_rollouts(rollout_ids=[each.rollout_id for each in rollouts], timeout=60)
        rewards: list[float | None] = []
        for rollout in ended:
            reward = agl.find_final_reward(await store.query_spans(rollout.rollout_id, "latest"))
            print(f"{rollout.input['path']}: {rollout.status}, reward {reward}")
            rewards.append(reward)
        return 0 if rewards == [1.0] * len(FILES) else 1
    finally:
        await store.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:4747")))
