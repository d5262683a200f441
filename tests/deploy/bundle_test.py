"""deploy/bundle makes an archive that runs on a system that has glibc and a shell, and nothing else.

The archive is unpacked in a bare root of its own: without Open MPI, gRPC, hwloc or ssh, and out of sight of the build.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / 'e2e'))
import harness  # noqa: E402

BUNDLE = harness.ROOT / 'deploy' / 'bundle'
BUILD = pathlib.Path(harness.BINARY).parent
GLIBC = ['libc.so.6', 'libm.so.6', 'libdl.so.2', 'libpthread.so.0', 'librt.so.1', 'libresolv.so.2', 'libutil.so.1',
         'libanl.so.1']
STORY = ['--temp', '0', '-n', '40', '-p', 'Once upon a time']
MIB = 1 << 20

# Run by /bin/sh in a mount namespace of its own: what the kernel gives every system, then into the bare root.
ENTER = r'''
set -e
root=$1; shift
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/dev/shm"
for device in null zero urandom; do : >"$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"; done
mount -t tmpfs tmpfs "$root/dev/shm"
mount --rbind /proc "$root/proc"
mount --rbind /sys "$root/sys"
exec env -i PATH=/bin OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \
  OMPI_MCA_rmaps_base_oversubscribe=1 OMPI_MCA_hwloc_base_binding_policy=none \
  /usr/sbin/chroot "$root" /bin/sh -c 'cd /opt/moved/here && exec "$@"' sh "$@"
'''


def unshare():
    return ['unshare', '--mount'] + ([] if os.geteuid() == 0 else ['--map-root-user'])


def make_root(root, archive):
    """A root folder with glibc, a shell and the unpacked archive at /opt/moved/here."""
    for folder in ['bin', 'dev', 'etc', 'lib64', 'lib/x86_64-linux-gnu', 'opt/moved', 'proc', 'sys', 'tmp/pc1', 'tmp/pc2']:
        (root / folder).mkdir(parents=True)
    shutil.copy('/lib64/ld-linux-x86-64.so.2', root / 'lib64')
    for name in GLIBC:
        shutil.copy(pathlib.Path('/lib/x86_64-linux-gnu') / name, root / 'lib' / 'x86_64-linux-gnu')
    shutil.copy('/bin/dash', root / 'bin' / 'sh')
    # Stands for ssh, as the program that Open MPI calls with a host's name and a command for the shell there. A new
    # login has none of the caller's variables. Each host has a temporary folder of its own: two daemons of one mpirun
    # that share one now and then crash over each other's copy of the machine's topology.
    agent = root / 'bin' / 'remote-shell'
    agent.write_text('#!/bin/sh\nhost=$1\nshift\nunset OPAL_PREFIX PMIX_PREFIX OMPI_MCA_plm\n'
                     'echo "agent: $host" >&2\nexport TMPDIR=/tmp/$host\neval "$*"\n')
    agent.chmod(0o755)
    with tarfile.open(archive) as tar:
        tar.extractall(root / 'opt' / 'moved')
    (unpacked,) = (root / 'opt' / 'moved').iterdir()
    unpacked.rename(root / 'opt' / 'moved' / 'here')
    return root / 'opt' / 'moved' / 'here'


class BundleTest(harness.TestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.folder = pathlib.Path(tempfile.mkdtemp(prefix='shoal-bundle-'))
        cls.archive = cls.folder / 'shoal.tar.xz'
        cls.made = harness.run(BUNDLE, '--build-dir', BUILD, cls.archive, timeout=600)
        assert cls.made.code == 0, str(cls.made)
        cls.root = cls.folder / 'root'
        cls.unpacked = make_root(cls.root, cls.archive)

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.folder)
        super().tearDownClass()

    def bare(self, *command):
        """Runs a command in the bare root, in the unpacked folder."""
        return harness.run(*unshare(), '/bin/sh', '-c', ENTER, 'sh', self.root, *command)

    def story(self):
        if not hasattr(BundleTest, 'expected'):
            BundleTest.expected = self.assert_ok(harness.shoal('run', *STORY)).out
        return BundleTest.expected

    def test_size_and_contents(self):
        self.assertLess(self.archive.stat().st_size, 60 * MIB)
        self.assertIn(b'MiB', self.made.out)
        for name in ['LICENSE', 'README.md', 'licenses/libopenmpi3.txt', 'bin/mpirun', 'bin/orted']:
            self.assertTrue((self.unpacked / name).is_file(), name)
        self.assertFalse(list(self.unpacked.glob('lib/libc.so*')), 'glibc belongs to the system')
        # Every text of a licence that a notice points at is there.
        for notice in (self.unpacked / 'licenses').glob('*.txt'):
            for text in re.findall(r'/usr/share/common-licenses/([\w.-]*\w)', notice.read_text(errors='replace')):
                self.assertTrue((self.unpacked / 'licenses' / text).is_file(), f'{notice.name} names {text}')

    def test_nothing_of_the_bare_root_helps(self):
        """The binary without its folder does not start there: the root is as bare as it claims."""
        alone = self.root / 'bin' / 'shoal'
        shutil.copy(self.unpacked / 'bin' / 'shoal', alone)
        self.addCleanup(alone.unlink)
        result = self.bare('/bin/shoal', '--version')
        self.assertEqual(result.code, 127, str(result))
        self.assertRegex(result.err, r'lib(mpi|hwloc|uring|grpc)\S*: cannot open shared object file')

    def test_ranks_in_process(self):
        result = self.assert_ok(self.bare('bin/shoal', 'run', '--in-process', '--tp', '2', *STORY))
        self.assertEqual(result.out, self.story())
        self.assertEqual(set(re.findall(r'rank (\d+) on', result.err)), {'0', '1'})

    def test_shoal_starts_the_ranks_with_the_bundled_mpirun(self):
        result = self.assert_ok(self.bare('bin/shoal', 'run', '--tp', '2', *STORY))
        self.assertEqual(result.out, self.story())
        self.assertEqual(set(re.findall(r'rank (\d+) on', result.err)), {'0', '1'})

    def test_bundled_mpirun(self):
        result = self.assert_ok(self.bare('bin/mpirun', '-np', '2', 'bin/shoal', 'run', '--pp', '2', *STORY))
        self.assertEqual(result.out, self.story())
        self.assertEqual(set(re.findall(r'rank (\d+) on', result.err)), {'0', '1'})

    def test_two_hosts_each_with_the_bundle(self):
        """orted is found at the same path and finds its plugins though nothing is set on that host."""
        mca = ['plm_rsh_agent', '/bin/remote-shell', 'oob_tcp_if_include', 'lo', 'btl', 'self,tcp',
               'btl_tcp_if_include', 'lo', 'plm_rsh_no_tree_spawn', '1']
        flags = [word for i in range(0, len(mca), 2) for word in ['--mca', *mca[i:i + 2]]]
        result = self.assert_ok(self.bare('/opt/moved/here/bin/mpirun', *flags, '--host', 'pc1,pc2', '-np', '2',
                                          '/opt/moved/here/bin/shoal', 'run', '--tp', '2', *STORY))
        self.assertEqual(result.out, self.story())
        self.assertEqual(set(re.findall(r'agent: (\w+)', result.err)), {'pc1', 'pc2'})

    def refused(self, *args, code, stubs=None):
        """A failing deploy/bundle: returns its stderr and leaves no archive."""
        out = self.scratch / 'refused.tar.xz'
        path = os.environ['PATH']
        if stubs:
            folder = self.scratch / 'stubs'
            folder.mkdir(exist_ok=True)
            for name, script in stubs.items():
                (folder / name).write_text(f'#!/bin/sh\n{script}\n')
                (folder / name).chmod(0o755)
            path = f'{folder}:{path}'
        result = harness.run(BUNDLE, *(args or ['--build-dir', BUILD, out]), env={'PATH': path})
        self.assertEqual(result.code, code, str(result))
        self.assertFalse(out.exists())
        return result.err

    def test_wrong_usage(self):
        self.assertIn('unknown option --cudda', self.refused('--cudda', code=harness.USAGE))
        self.assertIn('needs a value', self.refused('--preset', code=harness.USAGE))
        self.assertIn('give release, cuda or cuda-all', self.refused('--preset', 'fast', code=harness.USAGE))
        self.assertIn('.tar.xz', self.refused('shoal.zip', code=harness.USAGE))
        self.assertIn('one archive at a time', self.refused('a.tar.xz', 'b.tar.xz', code=harness.USAGE))
        empty = self.scratch / 'empty'
        empty.mkdir()
        self.assertIn('build it first', self.refused('--build-dir', empty, code=harness.UNREADABLE))
        self.assertIn('does not exist', self.refused('--build-dir', BUILD, self.scratch / 'no' / 'a.tar.xz',
                                                     code=harness.UNREADABLE))

    def test_an_archive_that_would_not_run_elsewhere_is_not_written(self):
        err = self.refused(code=harness.INTERNAL, stubs={'patchelf': 'exit 0'})
        self.assertIn("bin/shoal looks for libraries in '/", err)
        err = self.refused(code=harness.INTERNAL, stubs={
            'patchelf': 'exit 0', 'ldd': 'echo "libgone.so.1 => not found"'})
        self.assertIn('libgone.so.1 was not found', err)

    def test_a_library_left_out_is_seen(self):
        real = shutil.which('ldd')
        err = self.refused(code=harness.INTERNAL, stubs={
            'patchelf': 'exec /usr/bin/patchelf "$@"', 'ldd': f'{real} "$@" | grep -v libfmt'})
        self.assertIn('bin/shoal needs libfmt.so', err)


if __name__ == '__main__':
    if subprocess.run([*unshare(), 'true'], check=False, stderr=subprocess.DEVNULL).returncode != 0:
        print('skipped: a bare root needs a mount namespace, which is not permitted here')
        sys.exit(harness.SKIPPED)
    unittest.main(verbosity=2)
