// Included by generated sources; everything is in cuda_emulator.h.
