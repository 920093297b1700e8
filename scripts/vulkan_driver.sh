# Sourced by demo.sh and test.sh, after environment.sh: sees to it that there is a Vulkan driver.
#
# Where there is none, Mesa's is installed, which can compute on the CPU: on Debian and its
# descendants, as root or with a sudo that asks for no password. Never fails; without a driver
# `vulkan` stays empty. MLCAWQ_NO_INSTALL=1 installs nothing.

vulkan=""

vulkan_devices() {
  python - 2>/dev/null <<'PYTHON'
import sys
from mlcawq.engine.wgpu import adapters

found = adapters()
print("; ".join(f"{gpu.name} ({gpu.device_type})" for gpu in found))
sys.exit(not found)
PYTHON
}

install_software_vulkan() {
  [ -z "${MLCAWQ_NO_INSTALL:-}" ] && command -v apt-get >/dev/null || return 1
  root=""
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 1
    root="sudo -n"
  fi
  echo "installing Mesa's Vulkan drivers (first run only)" >&2
  packages="libvulkan1 mesa-vulkan-drivers"
  get="$root env DEBIAN_FRONTEND=noninteractive apt-get -qq"
  # The lists of packages may be missing, or older than what the archive has.
  { $get install --yes --no-install-recommends $packages ||
    { $get update && $get install --yes --no-install-recommends $packages; }; } >/dev/null 2>&1
}

if vulkan="$(vulkan_devices)" || { install_software_vulkan && vulkan="$(vulkan_devices)"; }; then
  echo "Vulkan: $vulkan" >&2
else
  vulkan=""
  echo "no Vulkan driver: what needs one is skipped (mlcawq doctor says more;" \
    "Debian, Ubuntu: apt install mesa-vulkan-drivers)" >&2
fi
