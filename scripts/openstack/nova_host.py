"""Nova's own classes of a compute host, for scripts/test-openstack. Runs in a virtual environment that has Nova.

Reads one JSON object a line from standard input, and answers each with one. What Nova prints goes to standard error.
"""

import json
import os
import sys
import types

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import nova.conf  # noqa: E402
import nova.privsep  # noqa: E402
from nova.virt import images  # noqa: E402
from nova.virt.libvirt import imagebackend, imagecache  # noqa: E402
from nova.virt.libvirt import utils as libvirt_utils  # noqa: E402

from nova import config, context, exception, objects  # noqa: E402, F401

CONF = nova.conf.CONF


def start(instances, glance, nova_conf):
    # Without the privileged helper: this process has the rights.
    nova.privsep.sys_admin_pctxt.set_client_mode(False)
    with open(nova_conf, "w") as file:
        file.write(f"[DEFAULT]\ninstances_path = {instances}\nforce_raw_images = True\n")
        file.write(f"[glance]\nendpoint_override = {glance}\nnum_retries = 0\n")
    CONF([], project="nova", default_config_files=[nova_conf])
    objects.register_all()


def create(instance, image, size, token):
    """As LibvirtDriver._create_image does it for the root disk."""
    path = os.path.join(CONF.instances_path, instance, "disk")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    disk = imagebackend.Qcow2(path=path)
    user = context.RequestContext(user_id="admin", project_id="admin", auth_token=token, is_admin=True)
    disk.cache(
        fetch_func=libvirt_utils.fetch_image,
        context=user,
        filename=imagecache.get_cache_fname(image),
        size=size,
        image_id=image,
        trusted_certs=None,
    )
    return {"disk": path, "backing": libvirt_utils.get_disk_backing_file(path, basename=False)}


def cache_manager(used, instances, minimum_age):
    """A pass of the manager of the cache; `used`: the images of instances."""
    CONF.set_override("remove_unused_original_minimum_age_seconds", minimum_age, group="image_cache")
    manager = imagecache.ImageCacheManager()
    running = {
        "used_images": {image: (1, 0, ["instance"]) for image in used},
        "instance_names": set(instances),
        "used_swap_images": set(),
        "used_ephemeral_images": set(),
    }
    # The instances are in a database that is not here.
    manager._list_running_instances = lambda *_: running
    manager.update(None, [])
    return {"usage": manager.get_disk_usage()}


def inspect(path):
    return {"format": str(images.get_image_format(path))}


COMMANDS = {"start": start, "create": create, "cache_manager": cache_manager, "inspect": inspect}


def main():
    for line in sys.stdin:
        asked = types.SimpleNamespace(**json.loads(line))
        try:
            answer = {"result": COMMANDS[asked.command](**asked.arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=ANSWERS, flush=True)


main()
