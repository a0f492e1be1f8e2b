// A party's cluster: at most one machine, run as the party's identity, no way to log in.
param workspace string
param name string
param identity string
param principal string
param location string
param vmSize string
param idle string
param private bool
param registry string
param workspaceStore string

var contributor = 'ba92f5b4-2d11-453d-a403-e96b0029c9fe' // Storage Blob Data Contributor
var acrPull = '7f951dda-4ed3-4680-a7ca-43fe172d538d'
var roles = 'Microsoft.Authorization/roleDefinitions'

resource home 'Microsoft.MachineLearningServices/workspaces@2024-10-01' existing = {
  name: workspace
}

resource cluster 'Microsoft.MachineLearningServices/workspaces/computes@2024-10-01' = {
  parent: home
  name: name
  location: location
  identity: {
    type: 'UserAssigned'
    userAssignedIdentities: { '${identity}': {} }
  }
  properties: {
    computeType: 'AmlCompute'
    disableLocalAuth: true
    properties: {
      vmSize: vmSize
      vmPriority: 'Dedicated'
      osType: 'Linux'
      scaleSettings: {
        minNodeCount: 0
        maxNodeCount: 1
        nodeIdleTimeBeforeScaleDown: idle
      }
      remoteLoginPortPublicAccess: 'Disabled'
      enableNodePublicIp: !private
    }
  }
}

resource images 'Microsoft.ContainerRegistry/registries@2023-07-01' existing = {
  name: registry
}

resource pulls 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(resourceGroup().id, registry, principal, acrPull)
  scope: images
  properties: {
    principalId: principal
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId(roles, acrPull)
  }
}

// Its jobs' code and logs: without keys, by the identity that they run as.
resource codeAndLogs 'Microsoft.Storage/storageAccounts@2023-05-01' existing = {
  name: workspaceStore
}

resource reads 'Microsoft.Authorization/roleAssignments@2022-04-01' = {
  name: guid(resourceGroup().id, workspaceStore, principal, contributor)
  scope: codeAndLogs
  properties: {
    principalId: principal
    principalType: 'ServicePrincipal'
    roleDefinitionId: subscriptionResourceId(roles, contributor)
  }
}
