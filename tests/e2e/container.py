"""Runs a container of a pod's manifest on this machine, as a container runtime would from the image.

As in a cluster: command, arguments and environment, with nothing of this machine's; user, groups, capabilities and
no_new_privs; a root file system that can't be written where the manifest says so; volumes; namespaces of its own for
processes, network, mounts, IPC and the host name, where the command is process 1.
Not as in a cluster: no filter of system calls, no limit of CPU or memory, and no network policy is enforced; and in
place of the image's files there are this machine's, with the checkout, unless TKNP_TEST_IMAGE names a folder with an
image's files, such as `buildah mount` gives.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.e2e import hosts
from tests.e2e.hosts import Host

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "deploy" / "docker" / "Dockerfile.cpu"
IMAGE = os.environ.get("TKNP_TEST_IMAGE")

# The new root is an overlay; what is written goes to memory. Arguments: the image's root, a folder for the new one, the
# host's name, a file for /etc/hosts, "ro" or "rw", the number of mounts, those (source, target, ro or rw), the command.
_PREPARE = r"""
set -e
image=$1 scratch=$2 name=$3 hosts=$4 root_mode=$5 num_mounts=$6; shift 6
hostname "$name"
mount -t tmpfs scratch "$scratch"; cd "$scratch"; mkdir upper work root
mount -t overlay overlay -o "lowerdir=$image",upperdir=upper,workdir=work root
cp "$hosts" root/etc/hosts
if [ "$image" = / ]; then
    install -d -o 1000 -g 1000 root/home/tknp
    printf '%s\n' root:x:0:0::/root:/bin/sh tknp:x:1000:1000::/home/tknp:/bin/sh >root/etc/passwd
    for folder in $OPEN_FOLDERS; do chmod a+rx "root$folder"; done
fi
unset OPEN_FOLDERS OLDPWD
mount -t proc proc root/proc; mount --rbind /sys root/sys; mount --rbind /dev root/dev
mount -t tmpfs -o size=64m,mode=1777 shm root/dev/shm
for _ in $(seq "$num_mounts"); do
    chroot root mkdir -p "$2"; target=root$(chroot root realpath "$2") # /var/run is a link, which would lead out
    mount --bind "$1" "$target"
    if [ "$3" = ro ]; then mount -o remount,bind,ro "$target"; fi
    shift 3
done
if [ "$root_mode" = ro ]; then mount -o remount,bind,ro root; fi
exec unshare --root root --wd /home/tknp "$@"
"""
_NAMESPACES = ("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private")
_TRY = """set -e
cd "$0"; mount -t tmpfs t .; cd .; mkdir u w r; mount -t overlay o -o lowerdir=/,upperdir=u,workdir=w r
ls "r$1" "r$2" >/dev/null # not on a file system of their own
"""


@cache
def why_not() -> str | None:
    """What this machine lacks for running containers; None if nothing."""
    if reason := hosts.why_not():
        return reason
    with tempfile.TemporaryDirectory() as folder:
        words = [folder, str(ROOT), str(Path(sys.executable).resolve())]
        done = subprocess.run([*_NAMESPACES, "bash", "-c", _TRY, *words], capture_output=True, text=True)
    return f"this machine makes no containers ({done.stderr.strip()})" if done.returncode else None


def image_env() -> dict[str, str]:
    """What the CPU image's recipe sets, with this machine's folder of programs if its files take the image's place."""
    lines = [line for line in RECIPE.read_text().splitlines() if line.startswith("ENV ")]
    env = dict(word.split("=", 1) for word in lines[-1].split()[1:])
    env["PATH"] = env["PATH"].replace("$PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if IMAGE is not None:
        return env
    return {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "PYTHONPATH": str(ROOT)}


def expand(text: str, known: Mapping[str, str]) -> str:
    """$(NAME) as the kubelet replaces it; unknown names stay, and $$(NAME) becomes $(NAME)."""
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else known.get(m[2], m[0]), text)


def container_env(
    container: Mapping[str, Any], fields: Mapping[str, str], cluster: Mapping[str, str]
) -> dict[str, str]:
    """All variables of a container. `fields`: of the pod, by path; `cluster`: what every pod of it gets."""
    env = {**image_env(), **cluster}
    for entry in container.get("env", ()):
        is_field = "valueFrom" in entry
        value = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]] if is_field else expand(entry.get("value", ""), env)
        env[entry["name"]] = value
    return env


class Container:
    """One running container.

    Args:
        pod_spec: of the manifest; says user and groups.
        mounts: folders of this machine by volume name.
        extra_mounts: more folders, by the path that the container sees, which it can't write.
    """

    def __init__(
        self,
        host: Host,
        pod_spec: Mapping[str, Any],
        container: Mapping[str, Any],
        env: Mapping[str, str],
        *,
        folder: Path,
        hosts_file: Path,
        mounts: Mapping[str, Path],
        extra_mounts: Mapping[str, Path],
    ) -> None:
        self.name = container["name"]
        self.log = folder / f"{self.name}.log"
        scratch = folder / f"{self.name}.root"
        scratch.mkdir(exist_ok=True)
        context = {**pod_spec["securityContext"], **container["securityContext"]}
        self._user = (str(context["runAsUser"]), str(context["runAsGroup"]))
        volumes = [
            word
            for mount in container.get("volumeMounts", ())
            for word in (str(mounts[mount["name"]]), mount["mountPath"], "ro" if mount.get("readOnly") else "rw")
        ] + [word for path, source in extra_mounts.items() for word in (str(source), path, "ro")]
        words = [expand(word, env) for word in (*container["command"], *container.get("args", ()))]
        mode = "ro" if context["readOnlyRootFilesystem"] else "rw"
        about = [IMAGE or "/", str(scratch), host.name, str(hosts_file), mode, str(len(volumes) // 3)]
        command = [*_NAMESPACES, "bash", "-c", _PREPARE, "prepare", *about, *volumes, *_restricted(context), *words]
        # The guard ends the container also when this test run is killed.
        guard = [sys.executable, "-m", "tknp.launch.guard", str(os.getpid())]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*guard, *host.command(command)],
                stdout=log,
                stderr=log,
                env={**env, "OPEN_FOLDERS": _folders_to_open()},
            )

    def init_pid(self) -> int:
        """The container's process 1, by this machine's count. Raises ProcessLookupError if it has ended."""
        while self.process.poll() is None:
            pids = [self.process.pid]
            for _ in range(2):  # the guard's child makes the namespaces, its child is in them
                pids = [int(pid) for pid in Path(f"/proc/{pids[0]}/task/{pids[0]}/children").read_text().split()]
                if not pids:
                    break
            else:
                return pids[0]
            time.sleep(0.05)
        raise ProcessLookupError(f"container {self.name} has ended")

    def exec(self, words: Sequence[str], seconds: float) -> None:
        """Runs a command inside. Raises CalledProcessError or TimeoutExpired."""
        uid, gid = self._user
        inside = ["nsenter", "--target", str(self.init_pid()), "--all", "--root", "--wd", "--setuid", uid]
        subprocess.run([*inside, "--setgid", gid, "--", *words], check=True, timeout=seconds, env=image_env())

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """To its process 1 alone, as container runtimes do; the end of that one is the end of all others."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init_pid(), signal_number)

    def tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def _restricted(context: Mapping[str, Any]) -> list[str]:
    """A prefix that gives up what the security context gives up."""
    words = ["setpriv", f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}"]
    words.append(f"--groups={context['fsGroup']}")
    if context["capabilities"]["drop"] == ["ALL"]:
        words += ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]
    return words if context["allowPrivilegeEscalation"] else [*words, "--no-new-privs"]


def _folders_to_open() -> str:
    """Folders on the way to the interpreter and to the checkout: in an image everybody may pass them, here they may lie
    in somebody's home."""
    ends = (Path(sys.executable), Path(sys.executable).resolve(), ROOT / "x")
    return " ".join(sorted({str(folder) for end in ends for folder in end.parents if folder != Path("/")}))
