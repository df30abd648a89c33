"""What a job does just now: tasks, actors, objects, nodes, processes, placement groups. Names and fields are Ray's.

Only what lives or waits is in here: nobody keeps a book of what is over, so a task that has finished, an actor that has died or a
group that was removed is not found. Each call asks all ranks once, and blocks for the round trip. A rank tells of at most
10,000 tasks. Calls that a driver waits for one by one go straight to a worker, and do not show.

Fields of Ray's that have no meaning here (exit causes, times, call sites) are missing.
"""

from hpcray.util.state.api import (
    get_actor,
    get_job,
    get_node,
    get_objects,
    get_placement_group,
    get_task,
    get_worker,
    list_actors,
    list_jobs,
    list_nodes,
    list_objects,
    list_placement_groups,
    list_tasks,
    list_workers,
    summarize_actors,
    summarize_objects,
    summarize_tasks,
)

__all__ = [
    "get_actor",
    "get_job",
    "get_node",
    "get_objects",
    "get_placement_group",
    "get_task",
    "get_worker",
    "list_actors",
    "list_jobs",
    "list_nodes",
    "list_objects",
    "list_placement_groups",
    "list_tasks",
    "list_workers",
    "summarize_actors",
    "summarize_objects",
    "summarize_tasks",
]
