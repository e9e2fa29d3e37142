/* The cost of the ioctls alone: map and unmap one range, again and again. */

#include <errno.h>
#include <linux/vfio.h>
#include <stdint.h>
#include <sys/ioctl.h>

/* Returns 0, or the errno of the call that failed (EINVAL for the kernel's answer of +1). */
int map_loop(int container, uint64_t vaddr, uint64_t iova, uint64_t size, long rounds)
{
	struct vfio_iommu_type1_dma_map map = {
		.argsz = sizeof(map),
		.flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE,
		.vaddr = vaddr,
		.size = size,
	};
	struct vfio_iommu_type1_dma_unmap unmap = { .argsz = sizeof(unmap), .size = size };

	while (rounds--) {
		map.iova = iova;
		int answer = ioctl(container, VFIO_IOMMU_MAP_DMA, &map);
		if (answer)
			return answer < 0 ? errno : EINVAL;
		unmap.iova = iova;
		answer = ioctl(container, VFIO_IOMMU_UNMAP_DMA, &unmap);
		if (answer)
			return answer < 0 ? errno : EINVAL;
	}
	return 0;
}
