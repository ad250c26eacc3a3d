"""Cleaning of closed triangle meshes: no slivers, no faces without area, no edge of more than two faces.

A sliver is a triangle with an angle below `SLIVER_DEG`. It is removed by collapsing its shortest edge, or, where it is
flat because of one wide angle, by flipping its longest edge. Both keep the mesh closed: an edge is collapsed only if
its ends have exactly two common neighbours (the link condition, Dey et al. 1999), and flipped only if the new edge
does not exist yet; and neither may turn a face over, or move the surface by more than `MAX_MOVE`.
"""

import numpy as np
import trimesh

SLIVER_DEG = 4.0
PASSES = 8
MAX_TURN = 0.5  # least cosine between the normals of a face before and after
MAX_MOVE = 0.1  # of the median edge


def remove_slivers(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Return the mesh with its slivers removed where that keeps its shape; metadata is not kept."""
    surface = _Surface(mesh.vertices, mesh.faces)
    for _ in range(PASSES):
        before = surface.changes
        for face in surface.slivers():
            if surface.faces[face] is not None and surface.worst([surface.faces[face]]) > np.cos(_limit()):
                surface.mend(face)
        if surface.changes == before:
            break
    return surface.mesh()


def drop_flaps(mesh: trimesh.Trimesh) -> None:
    """Remove, in place, faces that name a vertex twice, and pairs of faces with the same three vertices."""
    ordered = np.sort(mesh.faces, axis=1)
    _, which, counts = np.unique(ordered, axis=0, return_inverse=True, return_counts=True)
    keep = (np.diff(ordered, axis=1) > 0).all(1) & (counts[which.reshape(-1)] == 1)
    mesh.update_faces(keep)
    mesh.remove_unreferenced_vertices()


def is_manifold(mesh: trimesh.Trimesh) -> bool:
    """Whether every edge belongs to exactly two faces, and the faces round every vertex are one fan."""
    _, counts = np.unique(np.sort(mesh.edges, axis=1), axis=0, return_counts=True)
    if not (counts == 2).all():
        return False
    # the corners at a vertex are one group if neighbouring faces are joined at both ends of their common edge
    corner, pairs = np.arange(3 * len(mesh.faces)).reshape(-1, 3), []
    first, second = mesh.face_adjacency.T
    for end in mesh.face_adjacency_edges.T:
        joined = [corner[face, (mesh.faces[face] == end[:, None]).argmax(1)] for face in (first, second)]
        pairs.append(np.stack(joined, 1))
    groups = trimesh.graph.connected_component_labels(np.concatenate(pairs), node_count=corner.size)
    return len(np.unique(groups)) == len(np.unique(mesh.faces))


def _limit() -> float:
    return np.radians(SLIVER_DEG)


class _Surface:
    """A mesh that is edited face by face. A removed face is None."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray) -> None:
        self.points = np.array(vertices, np.float64)
        self.faces: list[tuple[int, int, int] | None] = [tuple(face) for face in faces.tolist()]
        self.around: list[set[int]] = [set() for _ in self.points]  # the faces of each vertex
        self.changes = 0
        lengths = np.linalg.norm(np.diff(self.points[faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)], axis=1), axis=2)
        self.tolerance = MAX_MOVE * float(np.median(lengths))
        for i, face in enumerate(self.faces):
            for vertex in face:
                self.around[vertex].add(i)

    def mesh(self) -> trimesh.Trimesh:
        faces = np.array([face for face in self.faces if face is not None], np.int64).reshape(-1, 3)
        mesh = trimesh.Trimesh(self.points, faces, process=False)
        mesh.remove_unreferenced_vertices()
        return mesh

    def slivers(self) -> list[int]:
        """The faces with an angle below the limit, the thinnest first."""
        alive = [i for i, face in enumerate(self.faces) if face is not None]
        angle = trimesh.triangles.angles(self.points[np.array([self.faces[i] for i in alive])]).min(1)
        order = np.argsort(angle, kind="stable")
        return [alive[i] for i in order[: int((angle < _limit()).sum())]]

    def mend(self, face: int) -> None:
        """Collapse or flip an edge of a sliver; the first of both that is allowed and makes nothing worse."""
        corners = self.faces[face]
        edges = [(corners[(k + 1) % 3], corners[(k + 2) % 3]) for k in range(3)]  # the edge opposite each corner
        edges.sort(key=lambda edge: np.sum((self.points[edge[0]] - self.points[edge[1]]) ** 2))
        if not self.collapse(*edges[0]) and not self.flip(*edges[2]):
            self.collapse(*edges[1])

    def worst(self, faces: list[tuple[int, int, int]]) -> float:
        """The cosine of the smallest angle of some faces."""
        triangles = self.points[np.array(faces)]
        return float(_cosines(triangles).max())

    def neighbours(self, vertex: int) -> set[int]:
        return {other for face in self.around[vertex] for other in self.faces[face]} - {vertex}

    def collapse(self, a: int, b: int) -> bool:
        """Move b and a into one point: the middle of their edge, or one of both; return whether that was allowed."""
        shared = self.around[a] & self.around[b]
        if len(shared) != 2 or len(self.neighbours(a) & self.neighbours(b)) != 2:
            return False
        kept = [i for i in self.around[a] | self.around[b] if i not in shared]
        if len(kept) < 4:
            return False
        before = [self.faces[i] for i in kept]
        after = [tuple(a if vertex == b else vertex for vertex in face) for face in before]
        worst = max(self.worst(before), self.worst([self.faces[i] for i in shared]))
        normals, ends = _normals(self.points[np.array(before)]), self.points[[a, b]].copy()
        heights = (normals * self.points[np.array(before)[:, 0]]).sum(1)
        for point in (ends.mean(0), ends[0], ends[1]):
            self.points[a] = point
            moved = np.abs(normals @ point - heights).max()
            if moved > self.tolerance or self.worst(after) >= worst:
                continue
            if _agree(normals, _normals(self.points[np.array(after)]), MAX_TURN):
                self._replace(shared, kept, after)
                return True
        self.points[a] = ends[0]
        return False

    def flip(self, a: int, b: int) -> bool:
        """Replace the edge a-b of two faces by that of their other corners; return whether that was allowed."""
        shared = sorted(self.around[a] & self.around[b])
        if len(shared) != 2:
            return False
        before = [self.faces[i] for i in shared]
        c, d = (next(v for v in face if v not in (a, b)) for face in before)
        if c == d or d in self.neighbours(c):
            return False
        first = before[0]
        if first[(first.index(a) + 1) % 3] != b:  # so that the first face runs a, b, c
            a, b = b, a
        after = [(c, a, d), (d, b, c)]
        old, new = (_normals(self.points[np.array(faces)]) for faces in (before, after))
        first_is_thin = self.worst(before[:1]) > self.worst(before[1:])
        normal, apex = (old[1], c) if first_is_thin else (old[0], d)  # of the wider face, and the thin one's corner
        off_plane = abs(normal @ (self.points[apex] - self.points[a]))
        if off_plane > self.tolerance or self.worst(after) >= self.worst(before):
            return False
        if not _agree(np.stack([normal, normal]), new, MAX_TURN):
            return False
        self._replace((), shared, after)
        return True

    def _replace(self, removed, changed: list[int], after: list[tuple[int, int, int]]) -> None:
        for i in (*removed, *changed):
            for vertex in self.faces[i]:
                self.around[vertex].discard(i)
            self.faces[i] = None
        for i, face in zip(changed, after, strict=True):
            self.faces[i] = face
            for vertex in face:
                self.around[vertex].add(i)
        self.changes += 1


def _cosines(triangles: np.ndarray) -> np.ndarray:
    """Cosines of the angles [F, 3] of triangles [F, 3, 3]; 1, as of no angle, at a corner with an edge of length 0."""
    ahead = np.roll(triangles, -1, axis=1) - triangles
    behind = np.roll(triangles, 1, axis=1) - triangles
    length = np.linalg.norm(ahead, axis=2) * np.linalg.norm(behind, axis=2)
    return np.where(length > 0, (ahead * behind).sum(2) / np.where(length > 0, length, 1), 1.0)


def _normals(triangles: np.ndarray) -> np.ndarray:
    cross = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    return cross / np.maximum(np.linalg.norm(cross, axis=1, keepdims=True), 1e-30)


def _agree(before: np.ndarray, after: np.ndarray, least: float) -> bool:
    """Whether no normal turns by more than the angle of cosine `least`; one of zero length before may turn."""
    cosine = (before * after).sum(1)
    return bool(
        (np.linalg.norm(after, axis=1) > 0.5).all() and (cosine[np.linalg.norm(before, axis=1) > 0.5] > least).all()
    )
